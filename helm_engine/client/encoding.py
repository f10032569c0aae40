"""Bodies as bytes: JSON or MessagePack, with NumPy arrays and request models anywhere in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from pydantic import BaseModel

from helm_engine.client.messages import Answer
from helm_engine.exceptions import InvalidRequestError

Encoding: TypeAlias = Literal["json", "msgpack"]

MEDIA_TYPES: dict[Encoding, str] = {"json": "application/json", "msgpack": "application/msgpack"}


def encode(value: object, encoding: Encoding, field: str = "body") -> bytes:
    """Plain values, NumPy arrays and scalars, and the models of `helm_engine.protocol`.

    Raises:
        InvalidRequestError: the value cannot be sent; names the field that it is of.
    """
    try:
        if encoding == "msgpack":
            return msgspec.msgpack.encode(value, enc_hook=_plain)
        return msgspec.json.encode(value, enc_hook=_plain)
    # For strange types, integers beyond 64 bits, half surrogate pairs, objects within themselves.
    except (TypeError, OverflowError, ValueError, RecursionError, msgspec.EncodeError) as error:
        raise InvalidRequestError(f"{field}: cannot be sent: {error}", field) from error


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def decode(answer: Answer) -> Any:
    """The plain values of an answer, in the encoding that it says it has.

    Raises:
        ValueError: it is neither JSON nor MessagePack.
    """
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == MEDIA_TYPES["msgpack"]:
            return msgspec.msgpack.decode(answer.content)
        return msgspec.json.decode(answer.content)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error

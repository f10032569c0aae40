"""What the server's answers become; fields that this version does not know are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from helm_engine.client.encoding import decode
from helm_engine.client.errors import InvalidAnswerError, error_of_entry
from helm_engine.client.messages import Answer
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Recommendation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of `GET /v1/models`."""

    id: str
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of the longest history that it reads."""
    dialect: str
    capabilities: dict[str, dict[str, Any]]
    """What may be reused and split: `value` and `reason` by name."""


@dataclass(frozen=True, slots=True)
class ForgottenUser:
    """Answer of `POST /v1/users/{user}:forget`."""

    user: str
    blocks_forgotten: int
    """Blocks of KV that were kept for the user and are free now."""


@dataclass(frozen=True, slots=True)
class _Models:
    data: list[ServedModel]


@dataclass(frozen=True, slots=True)
class _Entries:
    data: list[Any]


def read_recommendation(answer: Answer) -> Recommendation:
    """The answer to one request.

    Raises:
        InvalidAnswerError: it is none.
    """
    return _read(answer, _recommendation)


def read_recommendations(answer: Answer, number: int) -> list[Recommendation | HelmError]:
    """The answers to as many requests, an error in the place of a request that failed.

    Raises:
        InvalidAnswerError: it is no such list.
    """

    def entries(value: object) -> list[Recommendation | HelmError]:
        data = msgspec.convert(value, _Entries).data
        if len(data) != number:
            raise ValueError(f"{len(data)} answers to {number} requests")
        return [
            error_of_entry(entry)
            if isinstance(entry, dict) and "error" in entry
            else _recommendation(entry)
            for entry in data
        ]

    return _read(answer, entries)


def read_models(answer: Answer) -> list[ServedModel]:
    """The models of a server.

    Raises:
        InvalidAnswerError: it is no such list.
    """
    return _read(
        answer,
        lambda value: [
            msgspec.convert(model, ServedModel) for model in msgspec.convert(value, _Entries).data
        ],
    )


def read_forgotten(answer: Answer) -> ForgottenUser:
    """What was forgotten.

    Raises:
        InvalidAnswerError: it says something else.
    """
    return _read(answer, lambda value: msgspec.convert(value, ForgottenUser))


def read_object(answer: Answer) -> dict[str, Any]:
    """An object whose fields differ from model to model.

    Raises:
        InvalidAnswerError: it is none.
    """
    return _read(answer, lambda value: msgspec.convert(value, dict[str, Any]))


def _read(answer: Answer, convert: Callable[[Any], T]) -> T:
    try:
        return convert(decode(answer))
    except ValueError as error:
        raise InvalidAnswerError(f"the server's answer cannot be read: {error}") from error


def _recommendation(value: object) -> Recommendation:
    """The one place that knows how the classes of `helm_engine.protocol` are filled."""
    return msgspec.convert(value, Recommendation)

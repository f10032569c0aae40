"""Bodies of requests and answers, as JSON and as msgpack."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec

from helm_engine.exceptions import InvalidRequestError
from helm_engine.int_array import parse_json
from helm_engine.protocol import (
    ErrorBody,
    Recommendation,
    RecommendationList,
    RecommendRequest,
    parse_request,
)

Answer = Recommendation | RecommendationList | ErrorBody


class Encoding(StrEnum):
    """How a body is written, by its media type."""

    JSON = "application/json"
    MSGPACK = "application/msgpack"


_MEDIA_TYPES = {
    "application/json": Encoding.JSON,
    "application/msgpack": Encoding.MSGPACK,
    "application/x-msgpack": Encoding.MSGPACK,
    "application/vnd.msgpack": Encoding.MSGPACK,
}
_ANYTHING = ("*/*", "application/*")
_WEIGHT = re.compile(r"(?:^|;)\s*[qQ]=([01](?:\.[0-9]{0,3})?)\s*(?:;|$)")


def encoding_of(media_type: str) -> Encoding | None:
    """The encoding that a header names, with or without parameters; None = one we do not know."""
    return _MEDIA_TYPES.get(media_type.partition(";")[0].strip().lower())


def encoding_accepted(accept: str, sent: Encoding) -> Encoding:
    """The encoding of an answer: what the `Accept` header likes best of those we know.

    Args:
        accept: the header; of equals the first is taken.
        sent: encoding of the request's body; taken where the header does not decide.
    """
    best, best_quality = sent, 0.0
    for one in accept.split(","):
        media_type, _, parameters = one.partition(";")
        wanted = sent if media_type.strip() in _ANYTHING else encoding_of(media_type)
        quality = _quality(parameters)
        if wanted is not None and quality > best_quality:
            best, best_quality = wanted, quality
    return best


def _quality(parameters: str) -> float:
    """The weight `q` among a media type's parameters, 0..1; one that is malformed counts as 1."""
    found = _WEIGHT.search(parameters)
    return 1.0 if found is None else float(found[1])


def parse_body(raw: bytes, encoding: Encoding) -> Any:
    """Takes a body apart, not yet checked against a schema.

    Integer arrays of JSON objects become int64 arrays; in msgpack they may be sent as a `bin` of
    little-endian int64.

    Raises:
        InvalidRequestError: the body is not of that encoding.
    """
    try:
        return parse_json(raw) if encoding is Encoding.JSON else msgspec.msgpack.decode(raw)
    except (ValueError, RecursionError, TypeError) as error:
        name = encoding.name if encoding is Encoding.JSON else "msgpack"
        raise InvalidRequestError(f"body: is not {name}: {error}", "body") from error


def decode_request(raw: bytes, encoding: Encoding = Encoding.JSON) -> RecommendRequest:
    """Parses and validates the body of one request.

    Raises:
        InvalidRequestError: names the field, or says that the body is not of that encoding.
    """
    return parse_request(parse_body(raw, encoding))


def encode_answer(answer: Answer | dict[str, Any], encoding: Encoding = Encoding.JSON) -> bytes:
    """An answer as a body."""
    if encoding is Encoding.JSON:
        return msgspec.json.encode(answer)
    return msgspec.msgpack.encode(answer)


def select_fields(answer: Recommendation, paths: Iterable[str]) -> dict[str, Any]:
    """Those parts of an answer that a request's `fields` name."""
    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
        node[""] = True  # All of it, whatever else is named below.
    selected: dict[str, Any] = _select(msgspec.to_builtins(answer), tree)
    return selected


def _select(value: Any, tree: dict[str, Any]) -> Any:
    if "" in tree:
        return value
    if isinstance(value, list):
        return [_select(one, tree) for one in value]
    return {name: _select(value[name], below) for name, below in tree.items()}

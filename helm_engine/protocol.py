"""The request and response of `/v1/recommend`, as clients see them; light to import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from helm_engine.exceptions import HelmError, InvalidRequestError
from helm_engine.int_array import MAX_INTEGER, IntArray, from_buffer

RECOMMEND_PATHS = ("/v1/recommend", "/recommend")

MAX_USER_LENGTH = 512
"""Characters of a user's id."""
MAX_MEMBERS = 256
"""Members of an object: more are refused before each is looked at, and gets an error of its own."""
MAX_FIELDS = 64
"""Paths in `fields`."""
MAX_ERROR_CHARACTERS = 1000
"""Of a message: errors quote what was sent, which may be as long as a body."""

Seconds = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


def _as_array(value: object) -> object:
    """A list or an array as it is; a tuple as a list, a msgpack buffer as an array."""
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, bytes):
        return from_buffer(value)
    raise ValueError("must be an array")


ParallelArray = Annotated[
    Any, BeforeValidator(_as_array), WithJsonSchema({"type": "array", "items": {}})
]
"""Of whatever type; the model that reads it says which."""


def _known_answer_field(path: str) -> str:
    if path not in ANSWER_FIELDS:
        raise ValueError(f"{path!r} is no part of an answer; known: {', '.join(ANSWER_FIELDS)}")
    return path


AnswerField = Annotated[str, AfterValidator(_known_answer_field)]
"""A part of the answer by its path: `usage`, `data.item_id`, `usage.timings_ms.queue`."""
AnswerFields = Annotated[
    list[AnswerField], Field(min_length=1, max_length=MAX_FIELDS, fail_fast=True)
]


ContextualId = Annotated[Any, WithJsonSchema({"type": "integer", "minimum": 0})]
"""Checked by the model that reads it."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_members(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_MEMBERS:
            raise ValueError(f"holds {len(value)} members, the limit is {MAX_MEMBERS}")
        return value


class _Events(_Strict):
    """Parallel arrays; further ones that the model does not read are checked for length only."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ParallelArray] = Field(init=False)

    item_ids: IntArray = Field(description="Item ids as the model knows them.")
    actions: IntArray | None = Field(default=None, description="What the user did, one per item.")

    def lengths(self) -> dict[str, int]:
        """Length of every array that was sent, by name."""
        return {name: len(values) for name, values in self if isinstance(values, list | np.ndarray)}


class History(_Events):
    """The user's past events, oldest first."""

    timestamps: IntArray | None = Field(
        default=None,
        description="Whole seconds, non-decreasing; required where the model uses times.",
    )
    start_index: int = Field(
        default=0,
        ge=0,
        le=MAX_INTEGER,
        description="Events of this user before the first one sent.",
    )


class Candidates(_Events):
    """The items to score now; duplicates are kept.

    They are scored alike, unless the model's candidates read one another in groups.
    """


class RecommendRequest(_Strict):
    """Body of `POST /v1/recommend`."""

    model: str | None = Field(
        default=None, description="Name of the model; absent = the one served."
    )
    user: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_USER_LENGTH,
        description="Who the history belongs to; without it nothing is kept for reuse.",
    )
    history: History
    candidates: Candidates | None = Field(
        default=None, description="Absent = the best items of the whole catalogue are retrieved."
    )
    context: dict[str, ContextualId] | None = Field(
        default=None, description="Contextual features, for models that take any."
    )
    request_time: Seconds | None = Field(
        default=None, description="Whole seconds; absent = the time of the last event."
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        le=MAX_INTEGER,
        description="Absent = all candidates, or 10 when retrieving.",
    )
    exclude_history: bool = Field(
        default=False, description="Leave items of the history out of the answer."
    )
    deadline_ms: float | None = Field(
        default=None, gt=0, description="Milliseconds after which the answer is of no use."
    )
    priority: int = Field(
        default=0, ge=-MAX_INTEGER, le=MAX_INTEGER, description="Lower runs first."
    )
    fields: AnswerFields | None = Field(
        default=None,
        description="Parts of the answer to send, such as `data.item_id`; absent = all of it.",
    )


class RecommendRequests(_Strict):
    """Several requests in one body of `POST /v1/recommend`; each is answered on its own."""

    requests: list[RecommendRequest] = Field(min_length=1)


@dataclass(slots=True)
class RecommendedItem:
    """One item of the answer; not frozen, because answers hold thousands and freezing costs."""

    index: int
    """Place in `candidates`, or rank when retrieving."""
    item_id: int
    score: float
    task_scores: dict[str, float] | None = None
    """Scores by task, for models that have tasks."""


@dataclass(frozen=True, slots=True)
class TimingsMs:
    """Milliseconds that the request waited for each phase."""

    queue: float
    load: float
    prefill: float
    score: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What the request took and what the caches spared."""

    history_tokens: int
    """Tokens of the context: contextual ones and those of the events that the model read."""
    cached_tokens: int
    """Those whose K and V were reused."""
    reuse_blocked: str | None
    """Why nothing was reused, when there is a reason beyond an empty cache."""
    candidates: int
    rows_requested: int
    """Distinct embedding rows needed."""
    rows_resident: int
    """Those in the pool when the request was first scheduled."""
    timings_ms: TimingsMs


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Answer of `POST /v1/recommend`; `data` is best first.

    With `fields` in the request, those alone are there.
    """

    id: str
    object: Literal["recommendation"] = "recommendation"
    created: int
    """Seconds since 1970."""
    model: str
    data: list[RecommendedItem]
    usage: Usage


def _paths(of: type, prefix: str = "") -> Iterator[str]:
    parts = {"data": RecommendedItem, "usage": Usage, "timings_ms": TimingsMs}
    for field in fields(of):
        yield prefix + field.name
        if field.name in parts:
            yield from _paths(parts[field.name], f"{prefix}{field.name}.")


ANSWER_FIELDS = tuple(_paths(Recommendation))
"""What `fields` of a request may name."""


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """Body of every answer that is not a success."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommendationList:
    """Answers of several requests of one body, in their order; each its own success or error."""

    object: Literal["list"] = "list"
    data: list[Recommendation | ErrorBody]


def error_body(error: HelmError) -> ErrorBody:
    """What a client is told about an error."""
    param = None if error.param is None else _printable(error.param)
    return ErrorBody(
        error=ErrorDetail(
            message=_printable(str(error)), type=error.error_type, param=param, code=error.status
        )
    )


def _printable(text: str) -> str:
    """Shortened; half a surrogate pair, which JSON can carry and UTF-8 cannot, as its escape."""
    if len(text) > MAX_ERROR_CHARACTERS:
        text = text[: MAX_ERROR_CHARACTERS - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def field_path(location: Sequence[int | str]) -> str:
    """A validation error's location as a client would write it: `history.item_ids[3]`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def invalid_request(errors: Sequence[Any]) -> InvalidRequestError:
    """The first of pydantic's errors as an error for the client."""
    first = errors[0]
    path = field_path(first["loc"]) or "body"
    index = first.get("ctx", {}).get("index")
    if index is not None:
        path += f"[{index}]"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        path, message = "body", f"is not JSON: {first.get('ctx', {}).get('error', message)}"
    elif first["type"] == "missing" and path == "body":
        message = "is missing"
    elif first["type"] == "extra_forbidden":
        message = "unknown field"
    return InvalidRequestError(f"{path}: {message}", param=path)


def parse_request(raw: object) -> RecommendRequest:
    """Validates one request body.

    Raises:
        InvalidRequestError: names the field.
    """
    if isinstance(raw, RecommendRequest):
        return raw
    try:
        return RecommendRequest.model_validate(raw)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from error

"""A request body: encoded once, its deadlines written anew for each attempt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from helm_engine.client.encoding import Encoding, encode
from helm_engine.exceptions import InvalidRequestError
from helm_engine.protocol import RecommendRequest


@dataclass(frozen=True, slots=True)
class _Request:
    fields: dict[str, msgspec.Raw]
    """All but the deadline, encoded."""
    deadline_ms: float
    """Infinite without one."""


class RequestBody:
    """One request, or the list of several."""

    def __init__(
        self,
        requests: Sequence[RecommendRequest | Mapping[str, object]],
        is_list: bool,
        encoding: Encoding,
    ) -> None:
        """Takes one request unless `is_list`.

        Raises:
            InvalidRequestError: names the field that cannot be sent, or asked for.
        """
        self.encoding = encoding
        self._is_list = is_list
        self._requests = [
            _encoded(request, f"requests[{place}]." if is_list else "", encoding)
            for place, request in enumerate(requests)
        ]
        deadlines = [request.deadline_ms / 1000 for request in self._requests]
        self.first_deadline = min(deadlines, default=math.inf)
        """Seconds from the start of the call; infinite without one."""
        self.last_deadline = max(deadlines, default=math.inf)

    def encode(self, elapsed: float) -> bytes:
        """The bytes of an attempt.

        Args:
            elapsed: seconds since the start of the call, fewer than `first_deadline`.
        """
        bodies = [
            request.fields
            if math.isinf(request.deadline_ms)
            else {**request.fields, "deadline_ms": request.deadline_ms - elapsed * 1000}
            for request in self._requests
        ]
        return encode({"requests": bodies} if self._is_list else bodies[0], self.encoding)


def _encoded(
    request: RecommendRequest | Mapping[str, object], prefix: str, encoding: Encoding
) -> _Request:
    if isinstance(request, RecommendRequest):
        request = {name: getattr(request, name) for name in request.model_fields_set}
    fields = {name: value for name, value in request.items() if value is not None}
    if "fields" in fields:
        # The answer would be no `Recommendation`.
        raise InvalidRequestError(
            f"{prefix}fields: the client reads whole answers; ask for parts over plain HTTP",
            f"{prefix}fields",
        )
    deadline_ms = _deadline_ms(fields.pop("deadline_ms", math.inf), f"{prefix}deadline_ms")
    encoded = {
        name: msgspec.Raw(encode(value, encoding, f"{prefix}{name}"))
        for name, value in fields.items()
    }
    return _Request(encoded, deadline_ms)


def _deadline_ms(value: object, field: str) -> float:
    """Checked here already, because retries are planned by it."""
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever has no float() is refused
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or not number > 0:
        raise InvalidRequestError(f"{field}: must be a positive number, not {value!r}", field)
    return number

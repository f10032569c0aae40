"""What passes between a call, which decides, and the sync or async client, which does the I/O."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from helm_engine.exceptions import HelmError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """To do: one attempt."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes | None
    seconds: float
    """Within which the whole answer must have come."""


@dataclass(frozen=True, slots=True)
class Pause:
    """To do: wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Done: a whole HTTP answer, of whatever status."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    content: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """Done: an attempt without a whole answer."""

    error: HelmError
    may_retry: bool
    """Nothing had been answered yet."""


Action: TypeAlias = Send | Pause
Outcome: TypeAlias = Answer | Failure | None
"""None after a pause."""
Steps: TypeAlias = Generator[Action, Outcome, T]
"""A call: yields what to do, is sent what came of it, returns the result."""

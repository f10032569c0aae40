"""Keeps requests away from an engine that fails, and lets one through now and then to see.

Closed: requests pass. After so many failures in a row it opens: none pass. When its time is over it
is half-open: one request passes as a trial. If that one is answered it closes, if it fails it opens
for twice as long, up to a limit. The pattern and its words are M. Nygard's ("Release It!", 2007).
Time is given, never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class BreakerState(Enum):
    """Whether requests pass."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a breaker opens and for how long."""

    failures_to_open: int = 3
    """Failures in a row: one may be the request's own fault."""
    open_s: float = 1.0
    """How long none pass the first time: an engine process takes about that long to be noticed."""
    max_open_s: float = 30.0
    """The longest that none pass."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: names the field.
        """
        if self.failures_to_open < 1:
            raise ValueError(f"failures_to_open: must be at least 1, not {self.failures_to_open}")
        if not 0.0 < self.open_s <= self.max_open_s:
            raise ValueError(
                f"open_s: must be above 0 and at most max_open_s ({self.max_open_s}), "
                f"not {self.open_s}"
            )


class CircuitBreaker:
    """Of one engine."""

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Closes it and forgets all failures: the engine is a new one."""
        self._failures = 0
        self._open_until: float | None = None
        self._open_s = self._config.open_s
        self._is_on_trial = False

    def state(self, now: float) -> BreakerState:
        """Where it stands."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def lets_pass(self, now: float) -> bool:
        """Whether a request may be sent."""
        if self._open_until is None:
            return True
        return now >= self._open_until and not self._is_on_trial

    def sent(self, now: float) -> bool:
        """A request was sent; whether it is the trial, which must be ended by one of the others."""
        if self._open_until is None or not self.lets_pass(now):
            return False
        self._is_on_trial = True
        return True

    def answered(self, now: float) -> None:
        """A request was answered; one that was sent before it opened proves nothing."""
        if self.state(now) is not BreakerState.OPEN:
            self.reset()

    def failed(self, now: float) -> None:
        """A request failed by the engine's fault, or got no answer in time."""
        state = self.state(now)
        if state is BreakerState.OPEN:
            return  # One fault fails all requests that were running: it counts once.
        self._failures += 1
        self._is_on_trial = False
        if state is BreakerState.HALF_OPEN:
            self._open_s = min(2.0 * self._open_s, self._config.max_open_s)
        elif self._failures < self._config.failures_to_open:
            return
        self._open_until = now + self._open_s

    def abandoned(self) -> None:
        """The trial ended without telling anything, so another may be sent."""
        self._is_on_trial = False

"""Exponential forgetting: how much time the sums that are kept stand for."""

from __future__ import annotations

from math import exp

_TICKS_PER_WINDOW = 64
"""Sums fade in steps of so small a part of the window, so that most calls cost a comparison."""


class DecayedSeconds:
    """Time that counts the less the longer it is past: a sum of rates divided by it is a rate.

    What fades is the caller's: it multiplies its sums by the factors that come back.
    """

    def __init__(self, window_s: float) -> None:
        """Something `window_s` seconds past counts 1 / e.

        Raises:
            ValueError: the window is not above 0.
        """
        if not window_s > 0.0:
            raise ValueError(f"window_s: must be above 0, not {window_s}")
        self._window = window_s
        self._tick = window_s / _TICKS_PER_WINDOW
        self._seconds = 0.0
        self._last: float | None = None

    def advance(self, now: float) -> float | None:
        """Lets time pass; None when it is too early for sums to fade, or the factor."""
        if self._last is None:
            self._last = now
        passed = now - self._last
        if passed < self._tick:
            return None
        factor = exp(-passed / self._window)
        self._seconds = self._seconds * factor + self._window * (1.0 - factor)
        self._last = now
        return factor

    def forget(self, factor: float) -> None:
        """Counts all that is past less; the caller's sums fade by the same factor."""
        self._seconds *= factor

    def rate(self, total: float, now: float) -> float:
        """What a sum is per second; 0 before any time has passed."""
        passed = 0.0 if self._last is None else now - self._last
        seconds = self._seconds + passed
        return total / seconds if seconds > 0.0 else 0.0

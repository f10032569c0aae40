"""Sums and quantiles in which what is past counts less and less: e^(-age / window).

Forward decay (Cormode, Shkapenyuk, Srivastava and Xu, "Forward Decay: A Practical Time Decay Model
for Streaming Systems", ICDE 2009): instead of shrinking the sums as time goes by, what comes later
is added with a larger weight, relative to a landmark. Adding costs the same however much is kept;
now and then the landmark moves and everything is scaled once.
"""

from __future__ import annotations

from math import exp, log2

_MOST_WINDOWS = 64.0
"""Weights grow to e^64 before the landmark moves: far from the limits of a float."""

LEAST_MS = 0.01
BINS_PER_DOUBLING = 16
_NUM_BINS = 24 * BINS_PER_DOUBLING
"""From 10 microseconds to almost three minutes; what is beyond falls into the last bin."""


class DecayedHistogram:
    """Milliseconds in bins of 4.4 %, to take quantiles of; weights are the caller's.

    Lists and a walk from above: high quantiles are a few bins away from the largest value.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * _NUM_BINS
        self._total = 0.0
        self._top = 0
        """No bin above it holds anything."""

    def add(self, milliseconds: float, weight: float) -> None:
        """Counts one value."""
        place = int(BINS_PER_DOUBLING * log2(max(milliseconds, LEAST_MS) / LEAST_MS))
        place = min(place, _NUM_BINS - 1)
        self._weights[place] += weight
        self._total += weight
        self._top = max(self._top, place)

    def scale(self, factor: float) -> None:
        """Multiplies all weights."""
        self._weights = [factor * one for one in self._weights]
        self._total = sum(self._weights)

    def quantile(self, share: float) -> float:
        """The value, in milliseconds, below which this share (0..1) lies; 0 where nothing is.

        It lies in the bin of the exact quantile.
        """
        if not self._total > 0.0:
            return 0.0
        above = (1.0 - share) * self._total
        place = self._top
        while above > self._weights[place] and place:
            above -= self._weights[place]
            place -= 1
        inside = self._weights[place]
        part = 1.0 - min(1.0, above / inside) if inside else 0.0
        return float(LEAST_MS * 2.0 ** ((place + part) / BINS_PER_DOUBLING))


class DecayedWindow:
    """Several sums that fade alike, and a histogram that fades with them if there is one."""

    def __init__(
        self, window_s: float, num_sums: int, now: float, histogram: DecayedHistogram | None = None
    ) -> None:
        """What is `window_s` seconds past counts 1 / e.

        Raises:
            ValueError: the window is not above 0.
        """
        if not window_s > 0.0:
            raise ValueError(f"window_s: must be above 0, not {window_s}")
        self.window_s = window_s
        self.sums = [0.0] * num_sums
        """Add `weight(at)` times a value; `read` has them as of a moment."""
        self._histogram = histogram
        self._start = self._landmark = now

    def weight(self, at: float) -> float:
        """What a value that belongs to this moment (seconds) is multiplied by when it is added."""
        windows = (at - self._landmark) / self.window_s
        if windows > _MOST_WINDOWS:
            factor = exp(-windows)
            self.sums = [factor * one for one in self.sums]
            if self._histogram is not None:
                self._histogram.scale(factor)
            self._landmark = at
            return 1.0
        return exp(windows)

    def read(self, now: float) -> list[float]:
        """All sums as of a moment that is not before any value."""
        factor = 1.0 / self.weight(now)
        return [factor * one for one in self.sums]

    def seconds(self, now: float) -> float:
        """The time that the sums stand for: a sum divided by it is a rate per second."""
        return self.window_s * (1.0 - exp(-max(0.0, now - self._start) / self.window_s))

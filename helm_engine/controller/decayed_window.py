"""Sums and quantiles in which what is past counts less and less: e^(-age / window).

Forward decay (Cormode, Shkapenyuk, Srivastava and Xu, "Forward Decay: A Practical Time Decay Model
for Streaming Systems", ICDE 2009): instead of shrinking the sums as time goes by, what comes later
is added with a larger weight, relative to a landmark. Adding costs the same however much is kept;
now and then the landmark moves and everything is scaled once.

A window is one float64 array: its length in seconds, when it began, the landmark, then the sums.
The bins of a histogram are sums like all others. So a kernel reads and writes all of it at once.
The kernels keep the interpreter's lock: they take about a microsecond, while getting back a lock
that another thread has taken meanwhile takes milliseconds.
"""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

WINDOW_S, _START, _LANDMARK = range(3)
FIRST_SUM = 3
"""Place of the first sum in a window."""
_MOST_WINDOWS = 64.0
"""Weights grow to e^64 before the landmark moves: far from the limits of a float."""

LEAST_MS = 0.01
BINS_PER_DOUBLING = 16
NUM_BINS = 24 * BINS_PER_DOUBLING
"""From 10 microseconds to almost three minutes; what is beyond falls into the last bin."""
_LOG_BIN = log(2.0) / BINS_PER_DOUBLING


def decayed_window(window_s: float, num_sums: int, now: float) -> npt.NDArray[np.float64]:
    """A window with nothing in it: float64 [FIRST_SUM + num_sums].

    What is `window_s` seconds past counts 1 / e; a sum gets `weight` times each value.

    Raises:
        ValueError: the window is not above 0.
    """
    if not window_s > 0.0:
        raise ValueError(f"window_s: must be above 0, not {window_s}")
    window = np.zeros(FIRST_SUM + num_sums)
    window[:FIRST_SUM] = window_s, now, now
    return window


@njit(cache=True)
def weight(window: Any, at: Any) -> Any:
    """What a value that belongs to this moment (seconds) is multiplied by when it is added.

    To be called before a sum is read: it may scale them all. A sum divided by it is the sum as of
    that moment.
    """
    windows = (at - window[_LANDMARK]) / window[WINDOW_S]
    if windows > _MOST_WINDOWS:
        factor = exp(-windows)
        for place in range(FIRST_SUM, len(window)):
            window[place] *= factor
        window[_LANDMARK] = at
        return 1.0
    return exp(windows)


@njit(cache=True)
def seconds(window: Any, now: Any) -> Any:
    """The time that the sums stand for: a sum divided by it is a rate per second."""
    passed = max(0.0, now - window[_START])
    return window[WINDOW_S] * (1.0 - exp(-passed / window[WINDOW_S]))


@njit(cache=True)
def bin_of(milliseconds: Any) -> Any:
    """In which of the NUM_BINS bins of 4.4 % a value is counted."""
    if not milliseconds > LEAST_MS:
        return 0
    return int(min(log(milliseconds / LEAST_MS) / _LOG_BIN, NUM_BINS - 1.0))


@njit(cache=True)
def quantiles(bins: Any, top: Any, total: Any, shares: Any) -> Any:
    """Milliseconds below which shares (0..1, falling) of the values lie; 0 where nothing is.

    Each lies in the bin of the exact quantile. High ones are a few bins away from the largest
    value, so the bins are gone through from above, and once for all shares.

    Args:
        bins: weights, float64 [NUM_BINS].
        top: no bin above it holds anything.
        total: of the weights.
        shares: a tuple.

    Returns:
        float64 [shares].
    """
    found = np.zeros(len(shares))
    if not total > 0.0:
        return found
    place, passed = int(top), 0.0
    for i in range(len(shares)):
        above = (1.0 - shares[i]) * total
        while place and (bins[place] == 0.0 or above - passed > bins[place]):
            passed += bins[place]
            place -= 1
        inside = bins[place]
        part = 1.0 - min(1.0, (above - passed) / inside) if inside > 0.0 else 0.0
        # Not a power of two: the code of exp is in the caches already.
        found[i] = LEAST_MS * exp((place + part) * _LOG_BIN)
    return found

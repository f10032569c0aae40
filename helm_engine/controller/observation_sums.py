"""What is kept of one engine's arrivals, ended requests and steps, and an observation made of it.

All of it is one float64 array. A query of the policy finds nothing of its own in the processor's
caches, since half a second of other work lies between two of them: what counts is how many objects
it touches. So one kernel takes over the scheduler's totals and says every field.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from helm_engine.controller.decayed_window import (
    FIRST_SUM,
    NUM_BINS,
    WINDOW_S,
    bin_of,
    decayed_window,
    quantiles,
    seconds,
)
from helm_engine.controller.decayed_window import weight as weight_of

# Places in the array: plain numbers, then three windows.
_SLO_MS, _ROW_BYTES, _NUM_PAGES, _LAST_ENDED = range(4)
_TOTALS = 4
"""Of the scheduler, as last taken over: context tokens, those that were reused, rows, those that
were in the pool, and the milliseconds of loads, of prefill and of scoring."""
_TOP = 11
"""The highest bin of the histogram that was ever used."""
_ARRIVALS = 12
_LONG_ARRIVALS = _ARRIVALS + FIRST_SUM + 1
_MEANS = _LONG_ARRIVALS + FIRST_SUM + 1

# Places in the window of means.
_REQUESTS, _VIOLATIONS, _LATENCY_MS, _QUEUE_MS, _TOKENS, _HOT = range(FIRST_SUM, FIRST_SUM + 6)
_PREFIX_QUERIES, _PREFIX_HITS, _ROW_QUERIES, _ROW_HITS = range(FIRST_SUM + 6, FIRST_SUM + 10)
_LOAD_MS, _PREFILL_MS, _SCORE_MS = range(FIRST_SUM + 10, FIRST_SUM + 13)
_FIRST_BIN = FIRST_SUM + 13
"""Of the histogram of latencies."""


def observation_sums(
    slo_ms: float,
    row_bytes: int,
    num_pages: int,
    totals: tuple[float, ...],
    windows_s: tuple[float, float, float],
    now: float,
) -> npt.NDArray[np.float64]:
    """Sums with nothing in them, for the other functions here.

    Args:
        slo_ms: the service level.
        row_bytes: of a row on the host link.
        num_pages: of the pool.
        totals: of the scheduler, in the order of `_TOTALS`.
        windows_s: after which counts 1 / e: a mean, an arrival, an arrival in the longer time.
        now: seconds.

    Raises:
        ValueError: a window is not above 0.
    """
    mean_s, arrivals_s, long_arrivals_s = windows_s
    return np.concatenate(
        [
            (slo_ms, row_bytes, num_pages, now, *totals, 0.0),
            decayed_window(arrivals_s, 1, now),
            decayed_window(long_arrivals_s, 1, now),
            decayed_window(mean_s, _FIRST_BIN - FIRST_SUM + NUM_BINS, now),
        ]
    )


@njit(cache=True)
def add_arrival(sums: Any, at: Any) -> None:
    """A request came at this moment."""
    for window in (sums[_ARRIVALS:_LONG_ARRIVALS], sums[_LONG_ARRIVALS:_MEANS]):
        weight = weight_of(window, at)
        window[FIRST_SUM] += weight


@njit(cache=True)
def add_ended(
    sums: Any, now: Any, arrival: Any, began: Any, tokens: Any, has_failed: Any, is_hot: Any
) -> None:
    """A request has ended now.

    Args:
        sums: see `observation_sums`.
        now: seconds; as `arrival`, and `began`, when it was first scheduled.
        arrival: when it came.
        began: `now` where it never was.
        tokens: of its context.
        has_failed: then it violates the service level.
        is_hot: whether its user had come shortly before.
    """
    means = sums[_MEANS:]
    weight = weight_of(means, now)
    latency_ms = (now - arrival) * 1e3
    means[_REQUESTS] += weight
    if has_failed or latency_ms > sums[_SLO_MS]:
        means[_VIOLATIONS] += weight
    means[_LATENCY_MS] += weight * latency_ms
    means[_QUEUE_MS] += weight * (began - arrival) * 1e3
    means[_TOKENS] += weight * tokens
    means[_HOT] += weight * is_hot
    place = bin_of(latency_ms)
    means[_FIRST_BIN + place] += weight
    sums[_TOP] = max(sums[_TOP], float(place))
    sums[_LAST_ENDED] = now


@njit(cache=True)
def observe(
    sums: Any,
    now: Any,
    totals: Any,
    committed: Any,
    target: Any,
    refill_backlog: Any,
    kv_gain_ms: Any,
    kv_loss_ms: Any,
    kv_samples: Any,
    emb_gain_ms: Any,
    emb_loss_ms: Any,
    emb_samples: Any,
) -> Any:
    """Takes over the scheduler's totals; returns the fields of `Observation`, in its order."""
    means, slo_ms = sums[_MEANS:], sums[_SLO_MS]
    # Of the quotients of two means it cancels.
    weight = weight_of(means, now)
    _take_over(sums, weight, totals)
    passed = seconds(means, now)
    requests = means[_REQUESTS]
    missed_bytes = sums[_ROW_BYTES] * (means[_ROW_QUERIES] - means[_ROW_HITS]) / weight
    rate, jump, sigmas = _arrival_rate(sums, now)
    levels = quantiles(means[_FIRST_BIN:], sums[_TOP], requests, (0.99, 0.95, 0.9, 0.5))
    return (
        now,
        _ratio(means[_HOT], requests),
        _ratio(means[_PREFIX_HITS], means[_PREFIX_QUERIES]),
        _ratio(means[_ROW_HITS], means[_ROW_QUERIES]),
        _ratio(means[_TOKENS], requests),
        _ratio(means[_VIOLATIONS], requests),
        committed,
        levels[0] / slo_ms,
        kv_gain_ms,
        kv_loss_ms,
        emb_gain_ms,
        emb_loss_ms,
        rate,
        jump,
        sigmas,
        _ratio(missed_bytes, passed),
        _ratio(means[_LOAD_MS] / weight, passed * 1e3),
        _ratio(means[_PREFILL_MS] / weight, passed * 1e3),
        _ratio(means[_SCORE_MS] / weight, passed * 1e3),
        _ratio(means[_QUEUE_MS], requests),
        refill_backlog,
        target - committed,
        now - sums[_LAST_ENDED],
        requests / weight,
        kv_samples,
        emb_samples,
        sums[_NUM_PAGES],
        levels[3] / slo_ms,
        levels[2] / slo_ms,
        levels[1] / slo_ms,
        _ratio(means[_LATENCY_MS], requests),
        slo_ms,
    )


@njit(cache=True)
def _take_over(sums: Any, weight: Any, totals: Any) -> None:
    """Counts what steps have asked for and found since the last call as of now."""
    means = sums[_MEANS:]
    for i in range(len(totals)):
        means[_PREFIX_QUERIES + i] += weight * (totals[i] - sums[_TOTALS + i])
        sums[_TOTALS + i] = totals[i]


@njit(cache=True)
def _arrival_rate(sums: Any, now: Any) -> Any:
    """Rate of now, over the long one, and how unlikely that is.

    A faded sum of a Poisson process of rate r has the mean r w and the variance r w / 2: twice
    the sum behaves as a Poisson number n. The square root of n + 3/8 has the variance 1/4
    whatever n is (Anscombe, Biometrika 1948), so the figure means the same at every rate.
    """
    arrivals = sums[_ARRIVALS:_LONG_ARRIVALS]
    rate, usual = _per_second(arrivals, now), _per_second(sums[_LONG_ARRIVALS:_MEANS], now)
    scale = 2.0 * arrivals[WINDOW_S]
    sigmas = 2.0 * (sqrt(scale * rate + 0.375) - sqrt(scale * usual + 0.375))
    return rate, _ratio(rate, usual) if usual > 0.0 else 1.0, sigmas


@njit(cache=True)
def _per_second(window: Any, now: Any) -> Any:
    weight = weight_of(window, now)
    return _ratio(window[FIRST_SUM] / weight, seconds(window, now))


@njit(cache=True)
def _ratio(part: Any, whole: Any) -> Any:
    return part / whole if whole > 0.0 else 0.0

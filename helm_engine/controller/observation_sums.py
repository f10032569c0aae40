"""What is kept of arrivals and ended requests, and an observation made of it in one kernel.

Three windows of `decayed_window`: the means with the histogram of latencies, and the arrivals of
now and of a longer time.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from numba import njit

from helm_engine.controller.decayed_window import (
    FIRST_SUM,
    NUM_BINS,
    WINDOW_S,
    bin_of,
    quantiles,
    seconds,
)
from helm_engine.controller.decayed_window import weight as weight_of

# Places in the window of means.
_REQUESTS, _VIOLATIONS, _LATENCY_MS, _QUEUE_MS, _TOKENS, _HOT = range(FIRST_SUM, FIRST_SUM + 6)
_PREFIX_QUERIES, _PREFIX_HITS, _ROW_QUERIES, _ROW_HITS = range(FIRST_SUM + 6, FIRST_SUM + 10)
_FIRST_BIN = FIRST_SUM + 10
NUM_MEANS = 10 + NUM_BINS
"""Sums in the window of means, the bins of the histogram included."""


@njit(cache=True)
def add_arrival(arrivals: Any, long_arrivals: Any, at: Any) -> None:
    """A request came at this moment."""
    weight = weight_of(arrivals, at)
    arrivals[FIRST_SUM] += weight
    weight = weight_of(long_arrivals, at)
    long_arrivals[FIRST_SUM] += weight


@njit(cache=True)
def add_ended(
    means: Any, now: Any, latency_ms: Any, queue_ms: Any, tokens: Any, is_late: Any, is_hot: Any
) -> None:
    """A request has ended now."""
    weight = weight_of(means, now)
    means[_REQUESTS] += weight
    means[_VIOLATIONS] += weight * is_late
    means[_LATENCY_MS] += weight * latency_ms
    means[_QUEUE_MS] += weight * queue_ms
    means[_TOKENS] += weight * tokens
    means[_HOT] += weight * is_hot
    means[_FIRST_BIN + bin_of(latency_ms)] += weight


@njit(cache=True)
def add_steps(means: Any, now: Any, before: Any, after: Any) -> None:
    """Steps were made up to now.

    Args:
        means: the window.
        now: seconds.
        before: totals of the scheduler when last asked: context tokens, those that were reused,
            rows, those that were in the pool.
        after: the same as of now.
    """
    weight = weight_of(means, now)
    means[_PREFIX_QUERIES] += weight * (after[0] - before[0])
    means[_PREFIX_HITS] += weight * (after[1] - before[1])
    means[_ROW_QUERIES] += weight * (after[2] - before[2])
    means[_ROW_HITS] += weight * (after[3] - before[3])


@njit(cache=True)
def read_sums(means: Any, arrivals: Any, long_arrivals: Any, now: Any, slo_ms: Any) -> Any:
    """What the sums say as of now, see the fields of `Observation` with these names.

    Returns:
        hot_user_share, kv_hit_rate, emb_hit_rate, mean_history_tokens, slo_violation_rate,
        p99_over_slo; arrival_rate, arrival_jump, arrival_jump_sigmas, missed rows per second,
        queue_delay_ms; num_requests; p50_over_slo, p90_over_slo, p95_over_slo, mean_latency_ms.
    """
    # Of the means the weight cancels.
    weight = weight_of(means, now)
    requests = means[_REQUESTS]
    missed = (means[_ROW_QUERIES] - means[_ROW_HITS]) / weight
    rate, jump, sigmas = _arrival_rate(arrivals, long_arrivals, now)
    levels = quantiles(means[_FIRST_BIN:], (0.99, 0.95, 0.9, 0.5))
    return (
        _ratio(means[_HOT], requests),
        _ratio(means[_PREFIX_HITS], means[_PREFIX_QUERIES]),
        _ratio(means[_ROW_HITS], means[_ROW_QUERIES]),
        _ratio(means[_TOKENS], requests),
        _ratio(means[_VIOLATIONS], requests),
        levels[0] / slo_ms,
        rate,
        jump,
        sigmas,
        _ratio(missed, seconds(means, now)),
        _ratio(means[_QUEUE_MS], requests),
        requests / weight,
        levels[3] / slo_ms,
        levels[2] / slo_ms,
        levels[1] / slo_ms,
        _ratio(means[_LATENCY_MS], requests),
    )


@njit(cache=True)
def _arrival_rate(arrivals: Any, long_arrivals: Any, now: Any) -> Any:
    """Rate of now, over the long one, and how unlikely that is.

    A faded sum of a Poisson process of rate r has the mean r w and the variance r w / 2: twice
    the sum behaves as a Poisson number n. The square root of n + 3/8 has the variance 1/4
    whatever n is (Anscombe, Biometrika 1948), so the figure means the same at every rate.
    """
    rate, usual = _per_second(arrivals, now), _per_second(long_arrivals, now)
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

"""When requests come, and who makes them: the same for every setting, whatever its events are.

All of it is batched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from helm_engine.simulator.arrival_file import read_arrivals
from helm_engine.simulator.workloads import Regime, Workload

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_RAMP_PARTS = 256
"""A ramp's load is taken for constant over each."""
_NOBODY = -1


# ---------------------------------------------------------------- when


def arrival_times(
    workload: Workload, requests_per_s: float, rng: np.random.Generator
) -> FloatArray:
    """Times at a rate that follows the regimes' loads: seconds, ascending, float64 [n].

    They are of a Poisson process, or real ones. Arrivals at rate 1 become those of the workload
    where time is stretched by the inverse of its cumulated rate.

    Raises:
        ValueError: the file of real ones is none; names the place.
    """
    knots, loads = _load_curve(workload)
    expected = np.concatenate([[0.0], np.cumsum(np.diff(knots) * loads * requests_per_s)])
    total = float(expected[-1])
    at_rate_1 = (
        np.sort(rng.random(rng.poisson(total))) * total
        if workload.arrivals is None
        else _again_and_again(read_arrivals(Path(workload.arrivals)), total)
    )
    times: FloatArray = np.interp(at_rate_1, expected, knots)
    return times


def _again_and_again(real: FloatArray, until: float) -> FloatArray:
    """Real times at a mean rate of 1, from the start again where they end.

    Args:
        real: at least two, ascending, float64 [n].
        until: the last one is before it.
    """
    number = len(real)
    once = (real - real[0]) * ((number - 1) / (real[-1] - real[0])) + 0.5
    rounds = np.arange(int(until // number) + 1)[:, None] * float(number)
    times: FloatArray = (rounds + once).ravel()
    return times[times < until]


def _load_curve(workload: Workload) -> tuple[FloatArray, FloatArray]:
    """Knots in seconds [k + 1], and the load between each two of them [k]."""
    knots, loads, begin = [np.zeros(1)], [], 0.0
    before = workload.regimes[0].load
    for regime, end in zip(workload.regimes, workload.ends, strict=True):
        if regime.ramp_s:
            shares = (np.arange(_RAMP_PARTS) + 0.5) / _RAMP_PARTS
            knots.append(begin + regime.ramp_s * (np.arange(_RAMP_PARTS) + 1) / _RAMP_PARTS)
            loads.append(before + (regime.load - before) * shares)
        if begin + regime.ramp_s < end:
            knots.append(np.array([end]))
            loads.append(np.array([regime.load]))
        begin, before = end, regime.load
    return np.concatenate(knots), np.concatenate(loads)


def regime_of(workload: Workload, times: FloatArray, rng: np.random.Generator) -> Int64Array:
    """Which regime's laws each request follows, int64 [n]; on a ramp it may be the one before."""
    ends = np.array(workload.ends)
    regimes = np.minimum(np.searchsorted(ends, times, side="right"), len(ends) - 1)
    begins = np.concatenate([[0.0], ends[:-1]])[regimes]
    ramps = np.array([one.ramp_s for one in workload.regimes])[regimes]
    follows = rng.random(len(times)) * ramps <= times - begins
    return np.where(follows, regimes, regimes - 1).astype(np.int64)


def drift_until(workload: Workload, times: FloatArray) -> Int64Array:
    """Ranks that popularity drifts by from the start until each time, int64 [n]."""
    ends = np.array([0.0, *workload.ends])
    speeds = np.array([one.drift_per_s for one in workload.regimes])
    reached = np.concatenate([[0.0], np.cumsum(np.diff(ends) * speeds)])
    ranks: Int64Array = np.interp(times, ends, reached).astype(np.int64)
    return ranks


# ---------------------------------------------------------------- who


def draw_users(
    regimes: list[Regime], regime: Int64Array, num_users: int, rng: np.random.Generator
) -> Int64Array:
    """User of each request, int64 [n], by the regime that it follows, int64 [n].

    Ranks of Zipf's law are spread over the ids at random.
    """
    users = np.empty(len(regime), dtype=np.int64)
    id_of_rank = rng.permutation(num_users)
    for number, law in enumerate(regimes):
        mine = np.flatnonzero(regime == number)
        is_hot = rng.random(len(mine)) < law.hot_user_share
        drawn = rng.integers(law.hot_users, size=(len(mine), law.hot_user_regularity))
        hot = law.first_hot_user + _longest_away(drawn, is_hot)
        cumulated = np.cumsum((np.arange(num_users) + 1.0) ** -law.user_zipf)
        ranks = np.searchsorted(cumulated, rng.random(len(mine)) * cumulated[-1], side="right")
        users[mine] = np.where(is_hot, hot, id_of_rank[ranks])
    return users


@njit(nogil=True, cache=True)
def _longest_away(drawn: Any, counts: Any) -> Any:
    """Of each row of `drawn` the one that was chosen longest ago, among the rows that count."""
    chosen = np.empty(len(drawn), dtype=np.int64)
    last = np.full(drawn.max() + 1 if len(drawn) else 0, -1, dtype=np.int64)
    for visit in range(len(drawn)):
        best = drawn[visit, 0]
        for one in drawn[visit]:
            if last[one] < last[best]:
                best = one
        chosen[visit] = best
        if counts[visit]:
            last[best] = visit
    return chosen


def draw_first_histories(
    regimes: list[Regime], regime: Int64Array, max_history: int, rng: np.random.Generator
) -> Int64Array:
    """Events that each request's history has if its user comes for the first time, int64 [n]."""
    means = np.array([one.history_mean for one in regimes])[regime]
    spreads = np.array([one.history_sd for one in regimes])[regime]
    drawn = np.rint(rng.normal(means, spreads)).astype(np.int64)
    lengths: Int64Array = np.clip(drawn, 1, max_history)
    return lengths


class Visits(NamedTuple):
    """Which person makes each request, and how long the history is: people outgrow a user's id."""

    people: Int64Array
    """Numbered in the order in which they first come, int64 [n]."""
    lengths: Int64Array
    """Events of the history, int64 [n]."""
    num_people: int


def follow_users(
    users: Int64Array,
    first_lengths: Int64Array,
    new_events: Int64Array,
    num_users: int,
    max_history: int,
) -> Visits:
    """Histories grow from visit to visit; who would exceed `max_history` is somebody new instead.

    Args:
        users: of each request, int64 [n].
        first_lengths: events if the user is new, int64 [n].
        new_events: that join after the visit, int64 [n].
        num_users: every user is below it.
        max_history: events.
    """
    return Visits(*_follow(users, first_lengths, new_events, num_users, max_history))


@njit(nogil=True, cache=True)
def _follow(
    users: Any, first_lengths: Any, new_events: Any, num_users: Any, max_history: Any
) -> Any:
    person_of = np.full(num_users, _NOBODY, dtype=np.int64)
    next_length = np.zeros(num_users, dtype=np.int64)
    people, lengths = np.empty_like(users), np.empty_like(users)
    num_people = 0
    for visit in range(len(users)):
        user = users[visit]
        if person_of[user] == _NOBODY or next_length[user] > max_history:
            person_of[user] = num_people
            next_length[user] = first_lengths[visit]
            num_people += 1
        people[visit], lengths[visit] = person_of[user], next_length[user]
        next_length[user] += new_events[visit]
    return people, lengths, num_people

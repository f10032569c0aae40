"""Laws by which a workload's requests are drawn: who comes when, and with which items.

Events follow MLPerf Inference DLRMv3's generator (`datasets.event_model` names the source) where
its law does not depend on a user's past visits one by one: a user likes a few of the categories,
and how much is the limit of its self-reinforcing choice, a Dirichlet law (Blackwell and MacQueen
1973). Added are what caches depend on: Zipf's law inside a category, and drift. With a drift of d,
rank r of a category at time t is its item (r - d t) mod size: new items come in at the top, and
what was popular sinks by d ranks a second.

All of it is batched. Draws of items are hashes of their numbers, so none has to be kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

from helm_engine.simulator.workloads import Regime, Setting, Workload

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_RAMP_PARTS = 256
"""A ramp's load is taken for constant over each."""
_MAX_ALPHA = 500
_NOBODY = -1
_GUIDES = 1 << 15
"""Parts of 0..1 that are told apart before a rank is searched for."""


# ---------------------------------------------------------------- when


def arrival_times(
    workload: Workload, requests_per_s: float, rng: np.random.Generator
) -> FloatArray:
    """Times of a Poisson process whose rate follows the regimes' loads: seconds, ascending, [n].

    Arrivals at rate 1 become those of the workload where time is stretched by the inverse of its
    cumulated rate.
    """
    knots, loads = _load_curve(workload)
    expected = np.concatenate([[0.0], np.cumsum(np.diff(knots) * loads * requests_per_s)])
    total = float(expected[-1])
    at_rate_1 = np.sort(rng.random(rng.poisson(total))) * total
    times: FloatArray = np.interp(at_rate_1, expected, knots)
    return times


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
        hot = law.first_hot_user + rng.integers(law.hot_users, size=len(mine))
        cumulated = np.cumsum((np.arange(num_users) + 1.0) ** -law.user_zipf)
        ranks = np.searchsorted(cumulated, rng.random(len(mine)) * cumulated[-1], side="right")
        users[mine] = np.where(is_hot, hot, id_of_rank[ranks])
    return users


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


# ---------------------------------------------------------------- what


class Tastes(NamedTuple):
    """What people like."""

    categories: Int64Array
    """Distinct ones of each person, int64 [people, categories]."""
    bounds: FloatArray
    """Cumulated shares of them, the last is 1, float64 [people, categories]."""


def draw_tastes(setting: Setting, num_people: int, rng: np.random.Generator) -> Tastes:
    """Tastes of so many people."""
    size = setting.categories_per_user
    keys = rng.random((num_people, setting.num_categories))
    categories = np.argpartition(keys, size - 1, axis=1)[:, :size].astype(np.int64)
    alphas = rng.integers(1, _MAX_ALPHA, size=(num_people, 1), endpoint=True)
    weights = rng.standard_gamma(np.broadcast_to(alphas / size, (num_people, size)))
    bounds = np.cumsum(weights + 1e-300, axis=1)
    bounds /= bounds[:, -1:]
    return Tastes(categories, bounds)


class Bags(NamedTuple):
    """So many draws of items, by one person under one regime at one time, for each bag."""

    sizes: Int64Array
    people: Int64Array
    regimes: Int64Array
    drift: Int64Array
    """Ranks that popularity has drifted by until then."""

    @property
    def bounds(self) -> Int64Array:
        """Where each bag begins among all draws, and where the last ends: int64 [bags + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)


def drift_until(workload: Workload, times: FloatArray) -> Int64Array:
    """Ranks that popularity drifts by from the start until each time, int64 [n]."""
    ends = np.array([0.0, *workload.ends])
    speeds = np.array([one.drift_per_s for one in workload.regimes])
    reached = np.concatenate([[0.0], np.cumsum(np.diff(ends) * speeds)])
    ranks: Int64Array = np.interp(times, ends, reached).astype(np.int64)
    return ranks


def draw_items(
    setting: Setting, regimes: list[Regime], tastes: Tastes, bags: Bags, key: int
) -> Int64Array:
    """Items of all bags, one bag after the other: int64 [draws]; `key` makes them others."""
    size = setting.num_items // setting.num_categories
    ranks = np.arange(size) + 1.0
    exponents, laws = np.unique([law.item_zipf for law in regimes], return_inverse=True)
    tables = np.cumsum(ranks ** -exponents[:, None], axis=1)
    tables /= tables[:, -1:]
    starts = np.arange(_GUIDES + 1) / _GUIDES
    guides = np.stack([np.searchsorted(table, starts, side="right") for table in tables])
    items: Int64Array = _draw(
        bags.bounds,
        bags.people,
        laws[bags.regimes],
        bags.drift,
        *tastes,
        tables,
        guides.astype(np.int32),
        np.uint64(key),
    )
    return items


@njit(nogil=True, cache=True)
def _uniform(number: Any, key: Any) -> Any:
    """SplitMix64, as `event_model.HashedUniforms`."""
    bits = (uint64(number) + uint64(1)) * uint64(0x9E3779B97F4A7C15) + key
    bits = (bits ^ (bits >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> uint64(27))) * uint64(0x94D049BB133111EB)
    bits ^= bits >> uint64(31)
    return np.float64(bits >> uint64(11)) * 2.0**-53


@njit(nogil=True, cache=True)
def _rank_of(draw: Any, table: Any, guide: Any) -> Any:
    """`np.searchsorted(table, draw, side="right")`, from a guide of where to begin.

    Chen and Asau, "On generating random variates from an empirical distribution", 1974.
    """
    part = int(draw * _GUIDES)  # Exact, as the number of parts is a power of two.
    low, high = guide[part], guide[part + 1]
    while low < high:
        middle = (low + high) // 2
        if table[middle] <= draw:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def _draw(
    bounds: Any,
    people: Any,
    laws: Any,
    drift: Any,
    categories: Any,
    shares: Any,
    tables: Any,
    guides: Any,
    key: Any,
) -> Any:
    items = np.empty(bounds[-1], dtype=np.int64)
    size = tables.shape[1]
    last = categories.shape[1] - 1
    for bag in range(len(people)):
        person, shift = people[bag], drift[bag]
        table, guide = tables[laws[bag]], guides[laws[bag]]
        for number in range(bounds[bag], bounds[bag + 1]):
            draw = _uniform(2 * number, key)
            place = 0
            while place < last and draw >= shares[person, place]:
                place += 1
            rank = _rank_of(_uniform(2 * number + 1, key), table, guide)
            item = (min(rank, size - 1) - shift) % size
            items[number] = categories[person, place] * size + item
    return items


def distinct_items(items: Int64Array, bounds: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Distinct items of each bag, ascending, as the engine's front merges equal candidates.

    Args:
        items: of all bags, int64 [draws].
        bounds: see `Bags`.

    Returns:
        The items that are left, int64 [m], and where each bag begins and the last ends.
    """
    # All bags at once: one long sort is several times as fast as many short ones.
    most = int(items.max(initial=0)) + 1
    bags = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    ordered = np.sort(bags * most + items)
    kept: tuple[Int64Array, Int64Array] = _drop_repeats(ordered, bounds, most)
    return kept


@njit(nogil=True, cache=True)
def _drop_repeats(ordered: Any, bounds: Any, most: Any) -> Any:
    kept, new_bounds = np.empty_like(ordered), np.empty_like(bounds)
    number = 0
    for bag in range(len(bounds) - 1):
        new_bounds[bag] = number
        for place in range(bounds[bag], bounds[bag + 1]):
            if place == 0 or ordered[place] != ordered[place - 1]:
                kept[number] = ordered[place] - bag * most
                number += 1
    new_bounds[-1] = number
    return kept[:number].copy(), new_bounds


@njit(nogil=True, cache=True)
def fill_histories(
    people: Any,
    lengths: Any,
    bounds: Any,
    first_items: Any,
    candidates: Any,
    candidate_bounds: Any,
    starts: Any,
) -> Any:
    """Events of all people, one person after the other: the first history, then what joined it.

    Args:
        people: of each visit, in the order of their first visits, int64 [n].
        lengths: of the history at each visit, int64 [n].
        bounds: where each person's first history begins in `first_items`, and the last ends.
        first_items: int64 [sum of first histories].
        candidates: drawn at each visit; the first of them join the history, int64 [draws].
        candidate_bounds: where each visit's begin, and the last's end, int64 [n + 1].
        starts: where each person's events begin, and the last's end, int64 [people + 1].
    """
    events = np.empty(starts[-1], dtype=np.int64)
    last_visit = np.full(len(starts) - 1, _NOBODY, dtype=np.int64)
    for visit in range(len(people)):
        person, start = people[visit], starts[people[visit]]
        before = last_visit[person]
        if before == _NOBODY:
            first = first_items[bounds[person] : bounds[person + 1]]
            events[start : start + len(first)] = first
        else:
            joined = lengths[visit] - lengths[before]
            shown = candidate_bounds[before]
            begin = start + lengths[before]
            events[begin : begin + joined] = candidates[shown : shown + joined]
        last_visit[person] = visit
    return events

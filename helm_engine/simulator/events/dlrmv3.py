"""Events of the setting `dlrmv3`: tastes for a few categories, Zipf's law inside each, and drift.

They follow MLPerf Inference DLRMv3's generator (`datasets.event_model` names the source) where
its law does not depend on a user's past visits one by one: a user likes a few of the categories,
and how much is the limit of its self-reinforcing choice, a Dirichlet law (Blackwell and MacQueen
1973). Added are what caches depend on: Zipf's law inside a category, and drift. With a drift of d,
rank r of a category at time t is its item (r - d t) mod size: new items come in at the top, and
what was popular sinks by d ranks a second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from helm_engine.simulator.events.law import Asked, Drawn, Int64Array, uniform
from helm_engine.simulator.workloads import Regime, Setting

FloatArray = npt.NDArray[np.float64]

_MAX_ALPHA = 500
_GUIDES = 1 << 15
"""Parts of 0..1 that are told apart before a rank is searched for."""


class Dlrmv3Law:
    """See `EventLaw`; every visit brings as many new events as its regime says."""

    def __init__(self, setting: Setting, regimes: list[Regime]) -> None:
        """Takes what a checked setting and its regimes say of items."""
        assert setting.num_categories is not None
        assert setting.categories_per_user is not None
        self._num_categories = setting.num_categories
        self._categories_per_user = setting.categories_per_user
        self._new_events = np.array([one.new_events for one in regimes], dtype=np.int64)
        ranks = setting.num_items // self._num_categories
        popularity = [(one.item_zipf or 0.0, one.catalogue_share) for one in regimes]
        different, self._law_of_regime = np.unique(popularity, axis=0, return_inverse=True)
        self._ranks = _cumulated_ranks(ranks, different)
        starts = np.arange(_GUIDES + 1) / _GUIDES
        guides = [np.searchsorted(one, starts, side="right") for one in self._ranks]
        self._guides = np.stack(guides).astype(np.int32)

    def new_events(self, regimes: Int64Array, rng: np.random.Generator) -> Int64Array:
        """See `EventLaw.new_events`."""
        events: Int64Array = self._new_events[regimes]
        return events

    def draw(self, asked: Asked, rng: np.random.Generator, keys: tuple[int, int]) -> Drawn:
        """See `EventLaw.draw`."""
        tastes = self._draw_tastes(asked.num_people, rng)
        firsts = asked.first_visits
        laws = self._law_of_regime[asked.regimes]
        begun = asked.people[firsts], laws[firsts], asked.drift[firsts]
        shown = asked.people, laws, asked.drift
        popularity = *tastes, self._ranks, self._guides
        return Drawn(
            _draw(asked.first_bounds, *begun, *popularity, np.uint64(keys[0])),
            _draw(asked.shown_bounds, *shown, *popularity, np.uint64(keys[1])),
        )

    def _draw_tastes(self, num_people: int, rng: np.random.Generator) -> _Tastes:
        size = self._categories_per_user
        keys = rng.random((num_people, self._num_categories))
        categories = np.argpartition(keys, size - 1, axis=1)[:, :size].astype(np.int64)
        alphas = rng.integers(1, _MAX_ALPHA, size=(num_people, 1), endpoint=True)
        weights = rng.standard_gamma(np.broadcast_to(alphas / size, (num_people, size)))
        bounds = np.cumsum(weights + 1e-300, axis=1)
        bounds /= bounds[:, -1:]
        return _Tastes(categories, bounds)


class _Tastes(NamedTuple):
    """What people like."""

    categories: Int64Array
    """Distinct ones of each person, int64 [people, categories]."""
    bounds: FloatArray
    """Cumulated shares of them, the last is 1, float64 [people, categories]."""


def _cumulated_ranks(size: int, popularity: FloatArray) -> FloatArray:
    """Cumulated shares of a category's ranks, float64 [laws, size].

    Args:
        size: items of a category.
        popularity: Zipf's exponent and the share of the items that is on offer, float64 [laws, 2].
    """
    ranks = np.arange(size) + 1.0
    tables = np.empty((len(popularity), size))
    for table, (exponent, on_offer) in zip(tables, popularity, strict=True):
        is_on_offer = ranks <= max(1.0, np.rint(on_offer * size))
        np.cumsum(ranks**-exponent * is_on_offer, out=table)
        table /= table[-1]
    return tables


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
    """Items of all bags: each is drawn by one person under one law at one time."""
    items = np.empty(bounds[-1], dtype=np.int64)
    size = tables.shape[1]
    last = categories.shape[1] - 1
    for bag in range(len(people)):
        person, shift = people[bag], drift[bag]
        table, guide = tables[laws[bag]], guides[laws[bag]]
        for number in range(bounds[bag], bounds[bag + 1]):
            draw = uniform(2 * number, key)
            place = 0
            while place < last and draw >= shares[person, place]:
                place += 1
            rank = _rank_of(uniform(2 * number + 1, key), table, guide)
            item = (min(rank, size - 1) - shift) % size
            items[number] = categories[person, place] * size + item
    return items

"""What EMB pages are worth, from small copies of the tenant itself that run beside it.

The EMB tenant counts, ages and refuses, so reuse distances do not tell what it would hold at
another size. But a cache that sees a hashed share of the rows and has this share of the slots hits
about as often as the whole one: miniature simulation (Waldspurger, Saemundsson, Ahmad and Park,
"Cache Modeling and Optimization using Miniature Simulations", ATC 2017). Three miniatures of our
own `EmbeddingCache` see the same lookups: one of the tenant's size, one a step smaller and one a
step larger. What they differ by is what the step is worth; what they have in common cancels, and
with it most of their error.
"""

from __future__ import annotations

from math import exp
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.distinct_rows import DistinctRows
from block_manager.embedding_cache import EmbeddingCache
from block_manager.spatial_sampling import SpatialSample

_MIN_MERGED, _MAX_MERGED = 256, 4096
_SLOTS_PER_MERGED = 4
"""Lookups of several steps are looked up at once, a quarter of what a miniature has slots: most of
what a lookup costs is the call, and what one call looks up cannot be evicted by it."""

_NOTHING = np.empty(0, dtype=np.int64)


class SlotGains(NamedTuple):
    """Hits of the whole tenant since the start, decayed, for each slot."""

    more: float
    """That one slot more would have added."""
    less: float
    """That one slot less would have cost."""


class MiniatureCaches:
    """Three sizes of the EMB tenant over a hashed share of its rows."""

    def __init__(
        self, num_pages: int, rows_per_page: int, num_rows: int, sample: SpatialSample
    ) -> None:
        """Takes the pages that the tenant can have at most, and the table's rows."""
        self._place_of_row, num_sampled = sample.places(num_rows)
        slots_per_page = rows_per_page * sample.share
        self._slots_per_page = max(1, round(slots_per_page))
        self._pages_per_page = slots_per_page / self._slots_per_page
        """Where a page's share is less than one slot, several pages share one of a slot."""
        self._most_pages = max(1, self._scaled(num_pages))
        self._distinct = DistinctRows(num_sampled)
        self._caches = [
            EmbeddingCache(_NOTHING, self._slots_per_page, max(1, num_sampled), self._most_pages)
            for _ in range(3)
        ]
        self._absent = [np.arange(self._most_pages)[::-1] for _ in self._caches]
        """Pages that each miniature does not have."""
        self._rows = np.empty(_MAX_MERGED, dtype=np.int64)
        self._times = np.empty(_MAX_MERGED, dtype=np.int64)
        self._num_kept = 0
        self._num_merged = _MIN_MERGED
        self._gains = SlotGains(0.0, 0.0)
        self.num_samples = 0.0
        """Lookups that the miniatures have seen, decayed."""

    def _scaled(self, num_pages: int) -> int:
        return round(num_pages * self._pages_per_page)

    def resize(self, num_pages: int, step: int) -> float:
        """Follows the tenant: sizes `step` pages below, at and above `num_pages`.

        Returns:
            How much of what was learnt still counts: a move by one step leaves 1 / e of it.
        """
        self._flush()
        moved = abs(self._scaled(num_pages) - self._caches[1].num_pages)
        for place, size in enumerate((max(0, num_pages - step), num_pages, num_pages + step)):
            self._resize_one(place, min(self._scaled(size), self._most_pages))
        slots = self._caches[1].num_slots
        self._num_merged = min(max(slots // _SLOTS_PER_MERGED, _MIN_MERGED), _MAX_MERGED)
        factor = exp(-moved / max(1, self._scaled(step)))
        self.fade(factor)
        return factor

    def _resize_one(self, place: int, num_pages: int) -> None:
        """Gives or takes pages; new ones are refilled at once, as the tenant refills its own."""
        cache, absent = self._caches[place], self._absent[place]
        change = num_pages - cache.num_pages
        if change < 0:
            pages, _ = cache.shrink(-change)
            self._absent[place] = np.concatenate([absent, pages])
        elif change > 0:
            self._absent[place] = absent[: len(absent) - change]
            cache.grow(absent[len(absent) - change :])
            while cache.wants_refill:
                refill = cache.plan_refill(cache.num_free_slots)
                if refill is not None:
                    cache.commit_refill(refill)

    def observe(self, row_ids: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> None:
        """Takes the distinct rows of a step (int64 [n]), and how often it uses each."""
        if self._num_kept + len(row_ids) > len(self._rows):
            self._flush()
            if len(row_ids) > len(self._rows):
                self._rows = np.empty(len(row_ids), dtype=np.int64)
                self._times = np.empty(len(row_ids), dtype=np.int64)
        self._num_kept = _keep(
            self._place_of_row, row_ids, times, self._rows, self._times, self._num_kept
        )
        if self._num_kept >= self._num_merged:
            self._flush()

    def _flush(self) -> None:
        """Has the miniatures look up what was kept."""
        if not self._num_kept:
            return
        kept = slice(0, self._num_kept)
        distinct = self._distinct.of(self._rows[kept])
        times = _sum_by_place(distinct.places, self._times[kept], len(distinct.row_ids))
        less, now, more = (
            _hits(cache, distinct.row_ids, times, distinct.counts) for cache in self._caches
        )
        low, middle, high = (cache.num_slots for cache in self._caches)
        self._gains = SlotGains(
            self._gains.more + (more - now) / max(1, high - middle),
            self._gains.less + (now - less) / max(1, middle - low),
        )
        self.num_samples += self._num_kept
        self._num_kept = 0

    def fade(self, factor: float) -> None:
        """Counts all that was observed less."""
        more, less = self._gains
        self._gains = SlotGains(more * factor, less * factor)
        self.num_samples *= factor

    def gains(self) -> SlotGains:
        """What one slot more and one less would have changed.

        A miniature has a share of the hits and of the slots, so its hits for each slot are those of
        the tenant.
        """
        return self._gains


def _hits(
    cache: EmbeddingCache,
    row_ids: npt.NDArray[np.int64],
    times: npt.NDArray[np.int64],
    lookups: npt.NDArray[np.int64],
) -> int:
    """Hits of merged steps: a row that the first of them admits is there for the others."""
    plan = cache.plan(row_ids, times)
    cache.commit(plan)
    hits: int = _count_hits(plan.resident, plan.slots, lookups)
    return hits


@njit(cache=True, nogil=True)
def _count_hits(resident: Any, slots: Any, lookups: Any) -> Any:
    hits = 0
    for i in range(len(slots)):
        if resident[i]:
            hits += lookups[i]
        elif slots[i] >= 0:
            hits += lookups[i] - 1
    return hits


@njit(cache=True, nogil=True)
def _keep(
    place_of_row: Any, row_ids: Any, times: Any, kept_rows: Any, kept_times: Any, number: Any
) -> Any:
    """Appends the sampled ones of a step's rows; returns how many are kept now."""
    for i in range(len(row_ids)):
        place = place_of_row[row_ids[i]]
        if place >= 0:
            kept_rows[number] = place
            kept_times[number] = times[i]
            number += 1
    return number


@njit(cache=True, nogil=True)
def _sum_by_place(places: Any, times: Any, number: Any) -> Any:
    """Sums of `times` by place: int64 [number]."""
    total = np.zeros(number, dtype=np.int64)
    for i in range(len(places)):
        total[places[i]] += times[i]
    return total

"""EMB's pages among its width classes: by the milliseconds that a page saves in each.

A width class is one row size, dtype included. A page belongs to one class at a time, and classes
compete for pages: growth goes where a page saves most, shrinking takes where it saves least, and
between moves of the boundary pages wander from one class to another. Rows without a slot are
counted too, so a class without any page can win one back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from block_manager.embedding_cache import EmbeddingCache
from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds
from block_manager.row_plan import RowMoves

_PORTIONS = 8
"""Grants and returns of many pages are decided in so many portions, each at new values."""
_HYSTERESIS = 1.25
"""A page wanders only where it saves so many times as much: counts are rough."""
_MEMORY_STEPS = 512
"""Demand is averaged over about so many steps."""


@dataclass(frozen=True, slots=True)
class WidthClass:
    """Rows of one size."""

    cache: EmbeddingCache
    miss_ms: float
    """What it costs to load one of its rows from the host."""

    def __post_init__(self) -> None:
        """Checks the cost.

        Raises:
            ValueError: it is negative or no number.
        """
        if not self.miss_ms >= 0.0:
            raise ValueError(f"miss_ms: must be at least 0, not {self.miss_ms}")


class ClassMove(NamedTuple):
    """Rows of one class to copy to other slots of the class."""

    width_class: int
    rows: RowMoves


class EmbeddingTenant:
    """Several width classes in the pages of the EMB tenant."""

    def __init__(self, classes: Sequence[WidthClass]) -> None:
        """Takes the classes with the pages that they have.

        Raises:
            ValueError: there is none.
        """
        if not classes:
            raise ValueError("classes: must not be empty")
        self.classes = tuple(classes)
        self._caches = [one.cache for one in self.classes]
        self._seen = np.zeros(len(self.classes))
        self._demand = np.zeros(len(self.classes))

    def page_ids(self) -> PageIds:
        """Pages of the tenant, int64, ascending."""
        return np.sort(np.concatenate([cache.page_ids() for cache in self._caches]))

    @property
    def num_pages(self) -> int:
        """Pages of all classes."""
        return sum(cache.num_pages for cache in self._caches)

    def observe_step(self) -> None:
        """A step was planned: each class's demand is averaged anew."""
        if len(self.classes) == 1:
            return
        accesses = np.array([cache.policy.num_accesses for cache in self._caches], dtype=float)
        self._demand += (accesses - self._seen - self._demand) / _MEMORY_STEPS
        self._seen = accesses

    def value_of_page(self, width_class: int, more: bool) -> float:
        """Milliseconds per step that a page more would save, or a page less would cost."""
        one = self.classes[width_class]
        slots, rows = one.cache.num_slots, one.cache.rows_per_page
        first = slots if more else max(0, slots - rows)
        share = one.cache.policy.share_of_ranks(first, first + rows)
        return float(share * self._demand[width_class] * one.miss_ms)

    def grow(self, page_ids: PageIds) -> None:
        """Takes pages (int64 [n]) that are not the tenant's and gives them to its classes."""
        if len(self.classes) == 1:
            self._caches[0].grow(page_ids)
            return
        for portion in np.array_split(page_ids, min(_PORTIONS, max(1, len(page_ids)))):
            values = [self.value_of_page(place, more=True) for place in range(len(self.classes))]
            # Without any demand yet, the class that has least of what it could use.
            order = sorted(range(len(values)), key=lambda one: (-values[one], self._coverage(one)))
            self._caches[order[0]].grow(portion)

    def _coverage(self, width_class: int) -> float:
        cache = self._caches[width_class]
        return cache.num_slots / max(1, cache.num_rows)

    def shrink(self, limit: int) -> tuple[PageIds, list[ClassMove]]:
        """Gives up to `limit` pages away, from where they save least; see `EmbeddingCache.shrink`.

        Returns:
            The pages, int64 [n]; and the copies to be made before anybody writes to them.
        """
        if len(self.classes) == 1:
            pages, rows = self._caches[0].shrink(limit)
            return pages, [ClassMove(0, rows)] if len(rows) else []
        given: list[PageIds] = []
        moves: list[ClassMove] = []
        portion = -(-limit // _PORTIONS)
        left = limit
        candidates = set(range(len(self.classes)))
        while left > 0 and candidates:
            giver = min(candidates, key=lambda one: self.value_of_page(one, more=False))
            pages, rows = self._caches[giver].shrink(min(portion, left))
            if not len(pages):
                candidates.discard(giver)
                continue
            given.append(pages)
            # In this order: a later portion may move on what an earlier one moved.
            moves.append(ClassMove(giver, rows))
            left -= len(pages)
        return np.concatenate([np.empty(0, dtype=np.int64), *given]), moves

    def rebalance(self, limit: int) -> list[ClassMove]:
        """Lets up to `limit` pages wander to the class where they save most.

        Returns:
            The copies to be made before anybody writes to the pages.
        """
        if len(self.classes) < 2:
            return []
        gains = [self.value_of_page(place, more=True) for place in range(len(self.classes))]
        taker = int(np.argmax(gains))
        givers = [
            place
            for place, cache in enumerate(self._caches)
            if place != taker
            and cache.num_pages
            and gains[taker] > _HYSTERESIS * self.value_of_page(place, more=False)
        ]
        if not givers or gains[taker] <= 0.0:
            return []
        giver = min(givers, key=lambda place: self.value_of_page(place, more=False))
        pages, rows = self._caches[giver].shrink(limit)
        self._caches[taker].grow(pages)
        return [ClassMove(giver, rows)]

    def check_integrity(self) -> None:
        """Each page has one class and each class's books add up.

        Raises:
            IntegrityError: says what does not hold.
        """
        pages = self.page_ids()
        for page in pages[:-1][pages[1:] == pages[:-1]][:1]:
            raise IntegrityError(f"EMB: page {page} belongs to two width classes")
        for cache in self._caches:
            cache.check_integrity()

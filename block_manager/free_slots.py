"""The free slots of one width class: whole pages that came and were not used yet, and loose slots.

A page comes and, as long as no row needed it, leaves again at the cost of one entry. Loose slots
are a stack with an index of places: one is taken out of the middle by putting the top one into its
place, so that a page that was used can leave at the cost of its own slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds
from block_manager.slot_pages import slots_of

Slots = npt.NDArray[np.int64]

_NOT_FREE = -1


class FreeSlots:
    """Slots of pages below `num_pages`; all operations are batches over distinct ones."""

    def __init__(self, num_pages: int, rows_per_page: int) -> None:
        self._rows_per_page = rows_per_page
        self._pages = np.empty(num_pages, dtype=np.int32)
        self._num_pages = 0
        num_ids = num_pages * rows_per_page
        self._stack = np.empty(num_ids, dtype=np.int32)
        self._place = np.full(num_ids, _NOT_FREE, dtype=np.int32)
        self._num_loose = 0

    def __len__(self) -> int:
        """Slots that are free."""
        return self._num_loose + self._num_pages * self._rows_per_page

    def take(self, limit: int) -> Slots:
        """Takes up to `limit` slots, loose ones first: int64 [n]."""
        loose: Slots = _pop(self._stack, self._place, self._num_loose, limit)
        self._num_loose -= len(loose)
        missing = limit - len(loose)
        if missing < 1 or not self._num_pages:
            return loose
        page_ids = self.take_pages(-(-missing // self._rows_per_page))
        opened = slots_of(page_ids, self._rows_per_page)
        self.put(opened[missing:])
        return np.concatenate([loose, opened[:missing]])

    def put(self, slots: Slots) -> None:
        """Adds slots (int64 [n]) that are not free; the first is taken first."""
        _push(self._stack, self._place, self._num_loose, slots)
        self._num_loose += len(slots)

    def discard(self, slots: Slots) -> None:
        """Takes those of the slots (int64 [n]) out that are loose."""
        self._num_loose = _discard(self._stack, self._place, self._num_loose, slots)

    def put_pages(self, page_ids: PageIds) -> None:
        """Adds pages (int64 [n]) without any row."""
        self._pages[self._num_pages : self._num_pages + len(page_ids)] = page_ids
        self._num_pages += len(page_ids)

    def take_pages(self, limit: int) -> PageIds:
        """Takes up to `limit` pages that no row was put on since they came: int64 [n]."""
        left = self._num_pages - max(0, min(limit, self._num_pages))
        page_ids: PageIds = self._pages[left : self._num_pages].astype(np.int64)
        self._num_pages = left
        return page_ids

    def all_free(self) -> Slots:
        """Every free slot, int64, ascending.

        Raises:
            IntegrityError: the stack and the index of places contradict each other.
        """
        stack = self._stack[: self._num_loose].astype(np.int64)
        if not np.array_equal(self._place[stack], np.arange(self._num_loose)):
            raise IntegrityError("EMB: a free slot is not where its index says")
        if int(np.count_nonzero(self._place != _NOT_FREE)) != self._num_loose:
            raise IntegrityError("EMB: the free slots are miscounted")
        whole = self._pages[: self._num_pages].astype(np.int64)
        return np.sort(np.concatenate([stack, slots_of(whole, self._rows_per_page)]))


@njit(nogil=True, cache=True)
def _pop(stack: Any, place: Any, number: Any, limit: Any) -> Any:
    taken = np.empty(max(0, min(limit, number)), dtype=np.int64)
    for i in range(len(taken)):
        taken[i] = stack[number - 1 - i]
        place[taken[i]] = _NOT_FREE
    return taken


@njit(nogil=True, cache=True)
def _push(stack: Any, place: Any, number: Any, slots: Any) -> None:
    for i in range(len(slots)):
        slot = slots[len(slots) - 1 - i]
        stack[number + i] = slot
        place[slot] = number + i


@njit(nogil=True, cache=True)
def _discard(stack: Any, place: Any, number: Any, slots: Any) -> Any:
    for slot in slots:
        hole = place[slot]
        if hole == _NOT_FREE:
            continue
        number -= 1
        top = stack[number]
        stack[hole] = top
        place[top] = hole
        place[slot] = _NOT_FREE
    return number

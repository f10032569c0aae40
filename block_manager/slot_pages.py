"""The pages of one width class: a ring to look through, and which of them may not leave now."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds
from block_manager.row_plan import NOWHERE

_MIN_PAGE_WINDOW = 64
"""Pages looked at, at least, for the coldest ones."""
_PAGE_WINDOW_FACTOR = 4
_SAMPLED_RUNS, _SAMPLED_RUN = 4, 4
"""Runs of slots of a page that say how hot it is: those of one run are read from memory at once."""
_NOT_OURS = -1


def slots_of(page_ids: PageIds, rows_per_page: int) -> npt.NDArray[np.int64]:
    """Slots of pages (int64 [n]), page by page: int64 [n * rows_per_page]."""
    places = np.arange(rows_per_page, dtype=np.int64)
    return (page_ids[:, None] * rows_per_page + places).reshape(-1)


class SlotPages:
    """Pages in a list without order; slot = page * rows_per_page + place."""

    def __init__(self, num_ids: int, rows_per_page: int) -> None:
        """Every page that ever comes is below `num_ids`."""
        self.rows_per_page = rows_per_page
        """Slots of a page."""
        self._list = np.empty(num_ids, dtype=np.int64)
        self._place = np.full(num_ids, _NOT_OURS, dtype=np.int32)
        self._number = 0
        self._reserved = np.zeros(num_ids, dtype=np.int32)
        """Slots of each page whose rows are being loaded."""
        self._slot_hand = 0
        self._page_hand = 0

    def __len__(self) -> int:
        """Pages."""
        return self._number

    @property
    def num_slots(self) -> int:
        """Slots of all pages."""
        return self._number * self.rows_per_page

    def page_ids(self) -> PageIds:
        """The pages, int64, ascending."""
        return np.sort(self._list[: self._number])

    def have(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether slots (int64 [n]) are on pages that are here: bool [n]."""
        is_here: npt.NDArray[np.bool_] = self._place[slots // self.rows_per_page] != _NOT_OURS
        return is_here

    def add(self, page_ids: PageIds) -> None:
        """Takes pages (int64 [n]).

        Raises:
            IntegrityError: a page is here already.
        """
        if (self._place[page_ids] != _NOT_OURS).any():
            raise IntegrityError("EMB: a page came that is the tenant's already")
        number = self._number + len(page_ids)
        self._list[self._number : number] = page_ids
        self._place[page_ids] = np.arange(self._number, number)
        self._number = number

    def remove(self, page_ids: PageIds) -> None:
        """Gives away pages (int64 [n]) that are here and have no reserved slots."""
        self._number = _take_out(self._list, self._place, self._number, page_ids)

    def next_slots(self, least: int) -> npt.NDArray[np.int64]:
        """Slots of the next pages of the ring, at least so many unless there are fewer: int64."""
        pages = -(-least // self.rows_per_page)
        window, self._slot_hand = self._next(self._slot_hand, pages)
        return slots_of(window, self.rows_per_page)

    def _next(self, hand: int, pages: int) -> tuple[PageIds, int]:
        """The next pages of the ring from a hand on, and where the hand goes."""
        if not self._number:
            return self._list[:0], 0
        places = (hand + np.arange(min(pages, self._number))) % self._number
        return self._list[places], int(hand + len(places)) % self._number

    def reserve(self, slots: npt.NDArray[np.int64]) -> None:
        """Rows are being loaded into slots (int64 [n]): their pages may not leave."""
        _count(self._reserved, slots, self.rows_per_page, 1)

    def release(self, slots: npt.NDArray[np.int64]) -> None:
        """No row is being loaded into these slots any longer."""
        _count(self._reserved, slots, self.rows_per_page, -1)

    def take_coldest(
        self, limit: int, row_of_slot: npt.NDArray[np.int32], counts: npt.NDArray[np.uint8]
    ) -> PageIds:
        """Takes up to `limit` pages out, the coldest of the next ones of the ring: int64 [n].

        Args:
            limit: pages wanted.
            row_of_slot: NOWHERE where a slot is empty, int32 [slots].
            counts: hotness of every row, uint8 [rows].
        """
        limit = min(limit, self._number)
        if limit < 1:
            return self._list[:0].copy()
        window, self._page_hand = self._next(
            self._page_hand, max(_MIN_PAGE_WINDOW, _PAGE_WINDOW_FACTOR * limit)
        )
        window = window[self._reserved[window] == 0]
        heat = _heat_of(window, row_of_slot, counts, self.rows_per_page, limit)
        coldest: PageIds = window[np.argsort(heat, kind="stable")[:limit]]
        self.remove(coldest)
        return coldest

    def check_integrity(self, reserved: npt.NDArray[np.int64]) -> None:
        """The list and its index agree; the reserved slots (int64 [n]) are these.

        Raises:
            IntegrityError: says what does not hold.
        """
        pages = self._list[: self._number]
        if not np.array_equal(self._place[pages], np.arange(self._number)) or (
            int(np.count_nonzero(self._place != _NOT_OURS)) != self._number
        ):
            raise IntegrityError("EMB: the list of pages contradicts its index")
        counted = np.bincount(reserved // self.rows_per_page, minlength=len(self._reserved))
        if not np.array_equal(counted, self._reserved):
            raise IntegrityError("EMB: the reserved slots of a page are miscounted")


@njit(nogil=True, cache=True)
def _count(reserved: Any, slots: Any, rows_per_page: Any, change: Any) -> None:
    for slot in slots:
        reserved[slot // rows_per_page] += change


@njit(nogil=True, cache=True)
def _heat_of(page_ids: Any, row_of_slot: Any, counts: Any, rows_per_page: Any, limit: Any) -> Any:
    """Sum of the hotness of rows on each page, a sample of them on large ones: int64 [n].

    Ends where `limit` pages have none: no page is colder.
    """
    heat = np.zeros(len(page_ids), dtype=np.int64)
    num_cold = 0
    stride = max(_SAMPLED_RUN, rows_per_page // _SAMPLED_RUNS)
    for i in range(len(page_ids)):
        end = (page_ids[i] + 1) * rows_per_page
        total = 0
        for first in range(end - rows_per_page, end, stride):
            for slot in range(first, min(first + _SAMPLED_RUN, end)):
                row = row_of_slot[slot]
                total += counts[max(row, 0)] * (row != NOWHERE)
        heat[i] = total
        num_cold += total == 0
        if num_cold == limit:
            return heat[: i + 1]
    return heat


@njit(nogil=True, cache=True)
def _take_out(pages: Any, place: Any, number: Any, leaving: Any) -> Any:
    """Takes pages out of the list: the last one takes the place of each. Returns the number."""
    for page in leaving:
        number -= 1
        last = pages[number]
        pages[place[page]] = last
        place[last] = place[page]
        place[page] = _NOT_OURS
    return number

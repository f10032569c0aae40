"""The free slots of one width class: taken from the top, and out of the middle when a page leaves.

A stack with an index of places. A slot is taken out of the middle by putting the top one into its
place, so that a page of slots can leave at the cost of its own slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.exceptions import IntegrityError

Slots = npt.NDArray[np.int64]

_NOT_FREE = -1


class FreeSlots:
    """Slots below `num_ids`; all operations are batches over arrays of distinct slots."""

    def __init__(self, num_ids: int) -> None:
        self._stack = np.empty(num_ids, dtype=np.int32)
        self._place = np.full(num_ids, _NOT_FREE, dtype=np.int32)
        self._number = 0

    def __len__(self) -> int:
        """Slots that are free."""
        return self._number

    def take(self, limit: int) -> Slots:
        """Takes up to `limit` slots, those that were put last first: int64 [n]."""
        taken: Slots = _pop(self._stack, self._place, self._number, limit)
        self._number -= len(taken)
        return taken

    def put(self, slots: Slots) -> None:
        """Adds slots (int64 [n]) that are not free; the first is taken first."""
        _push(self._stack, self._place, self._number, slots)
        self._number += len(slots)

    def discard(self, slots: Slots) -> None:
        """Takes those of the slots (int64 [n]) out that are free."""
        self._number = _discard(self._stack, self._place, self._number, slots)

    def all_free(self) -> Slots:
        """Every free slot, int64, ascending.

        Raises:
            IntegrityError: the stack and the index of places contradict each other.
        """
        stack = self._stack[: self._number].astype(np.int64)
        if not np.array_equal(self._place[stack], np.arange(self._number)):
            raise IntegrityError("EMB: a free slot is not where its index says")
        if int(np.count_nonzero(self._place != _NOT_FREE)) != self._number:
            raise IntegrityError("EMB: the free slots are miscounted")
        return np.sort(stack)


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

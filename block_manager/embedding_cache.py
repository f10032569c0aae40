"""The EMB tenant: which rows of a table sit in which slots of its pages.

Bookkeeping only: a step asks for its rows, gets a plan of what to load where, and the plan is
committed after the loads succeeded or abandoned after they failed. All operations are batches
over id arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds
from block_manager.row_policy import AgedFrequency, RowIds

NOWHERE = -1

_NOTHING = np.empty(0, dtype=np.int64)

_MIN_VICTIM_WINDOW = 1024
"""Slots looked at, at least, for the coldest ones: exact for small pools, bounded for large."""
_VICTIM_WINDOW_FACTOR = 4


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where the distinct rows of a step are, or will be once loaded; all arrays have length n."""

    row_ids: RowIds
    resident: npt.NDArray[np.bool_]
    """Already in the pool; the others must be loaded from the host."""
    slots: npt.NDArray[np.int64]
    """The row's slot, or NOWHERE when it was not admitted."""
    staging: npt.NDArray[np.int64]
    """The row's place in staging, or NOWHERE when it has a slot."""

    @property
    def admitted(self) -> npt.NDArray[np.int64]:
        """Which rows must be loaded into their slots: places in the arrays, int64, ascending."""
        if self.resident.all():
            return _NOTHING
        return np.flatnonzero(~self.resident & (self.slots != NOWHERE))

    @property
    def staged(self) -> npt.NDArray[np.int64]:
        """Which rows must be loaded into staging, likewise."""
        return _NOTHING if self.resident.all() else np.flatnonzero(self.staging != NOWHERE)


class EmbeddingCache:
    """Rows of one table in the pages of the EMB tenant. Slot = page * rows_per_page + place."""

    def __init__(
        self, page_ids: PageIds, rows_per_page: int, num_rows: int, track_dead: bool = False
    ) -> None:
        """Takes the EMB tenant's pages; a dense index of `num_rows` finds rows.

        With `track_dead`, slots whose row died are remembered until they are drained.
        """
        places = np.arange(rows_per_page, dtype=np.int64)
        self._pages = page_ids
        self._slots = (page_ids[:, None] * rows_per_page + places).reshape(-1)
        num_slots = int(self._slots.max(initial=-1)) + 1
        self._slot_of_row = np.full(num_rows, NOWHERE, dtype=np.int32)
        self._row_of_slot = np.full(num_slots, NOWHERE, dtype=np.int64)
        self._last_use = np.zeros(num_slots, dtype=np.int64)
        self._free = self._slots[::-1].copy()
        self._num_free = len(self._free)
        # Counted and not derived: metrics are read while a step runs on another thread.
        self._num_resident = 0
        self.num_evictions = 0
        self._policy = AgedFrequency(num_rows, len(self._slots))
        self._hand = 0
        self._step = 0
        self._open_plan: RowPlan | None = None
        self._track_dead = track_dead
        self._dead: list[npt.NDArray[np.int64]] = []

    def page_ids(self) -> PageIds:
        """Pages of the tenant, int64, ascending."""
        return self._pages

    @property
    def num_slots(self) -> int:
        """Rows the tenant has room for."""
        return len(self._slots)

    @property
    def num_rows(self) -> int:
        """Rows that may be asked for."""
        return len(self._slot_of_row)

    @property
    def is_settled(self) -> bool:
        """Whether every slot is either free or holds a row: no step has slots reserved."""
        return self._num_free + self._num_resident == len(self._slots)

    @property
    def num_resident(self) -> int:
        """Rows that are loaded and can be hit."""
        return self._num_resident

    @property
    def usage(self) -> float:
        """Share of the slots that hold rows, 0..1."""
        return self._num_resident / max(1, len(self._slots))

    def lookup(self, row_ids: RowIds) -> npt.NDArray[np.int64]:
        """Slots of rows (int64 [n]), NOWHERE for absent ones: int64 [n]. Changes nothing."""
        return self._slot_of_row[row_ids].astype(np.int64)

    @property
    def slot_of_row(self) -> npt.NDArray[np.int32]:
        """Slot of every row, NOWHERE for absent ones, int32 [num_rows]; not to be written to."""
        return self._slot_of_row

    def plan(self, row_ids: RowIds, times: npt.NDArray[np.int64]) -> RowPlan:
        """Decides where a step's rows come from and which of the missing ones are admitted.

        No slot that the plan uses is given to another of its rows, and there is no other plan until
        it is committed or abandoned.

        Args:
            row_ids: distinct rows, int64 [n].
            times: how often the step uses each, int64 [n].
        """
        if self._open_plan is not None:
            raise IntegrityError("EMB: the last step's row plan is still open")
        self._step += 1
        self._policy.record(row_ids, times)
        slots, resident, num_missing = _use(row_ids, self._slot_of_row, self._last_use, self._step)
        staging = np.full(len(row_ids), NOWHERE)
        if num_missing:
            self._admit(row_ids, slots, np.flatnonzero(~resident))
            homeless = np.flatnonzero(slots == NOWHERE)
            staging[homeless] = np.arange(len(homeless))
        self._open_plan = RowPlan(row_ids, resident, slots, staging)
        return self._open_plan

    def _admit(
        self, row_ids: RowIds, slots: npt.NDArray[np.int64], missing: npt.NDArray[np.int64]
    ) -> None:
        """Reserves slots for missing rows, hottest first: free ones, then those of colder rows."""
        hotness = self._policy.hotness(row_ids[missing])
        missing = missing[np.argsort(-hotness.astype(np.int64), kind="stable")]
        num_free = min(self._num_free, len(missing))
        granted = self._free[self._num_free - num_free : self._num_free][::-1].copy()
        self._num_free -= num_free
        rest = missing[num_free:]
        if len(rest):
            victims = self._coldest_slots(len(rest))
            rest = rest[: len(victims)]
            newcomers = self._policy.hotness(row_ids[rest])
            # Newcomers fall and victims rise in hotness, so this is true and then false.
            hotter = newcomers > self._policy.hotness(self._row_of_slot[victims])
            victims = victims[hotter]
            self._slot_of_row[self._row_of_slot[victims]] = NOWHERE
            self._row_of_slot[victims] = NOWHERE
            self._num_resident -= len(victims)
            self.num_evictions += len(victims)
            self._bury(victims)
            granted = np.concatenate([granted, victims])
        slots[missing[: len(granted)]] = granted
        self._last_use[granted] = self._step

    def _coldest_slots(self, limit: int) -> npt.NDArray[np.int64]:
        """Up to `limit` slots, coldest first, that the step does not use.

        They come from a window behind a moving hand.
        """
        width = min(len(self._slots), max(_MIN_VICTIM_WINDOW, _VICTIM_WINDOW_FACTOR * limit))
        window = self._slots[(self._hand + np.arange(width)) % max(1, len(self._slots))]
        self._hand = (self._hand + width) % max(1, len(self._slots))
        window = window[
            (self._last_use[window] != self._step) & (self._row_of_slot[window] != NOWHERE)
        ]
        hotness = self._policy.hotness(self._row_of_slot[window])
        order = np.lexsort((self._last_use[window], hotness))
        coldest: npt.NDArray[np.int64] = window[order[:limit]]
        return coldest

    def commit(self, plan: RowPlan) -> None:
        """The plan's loads succeeded: its admitted rows can be hit from now on."""
        loaded = self._close(plan)
        if not len(loaded):
            return
        self._slot_of_row[plan.row_ids[loaded]] = plan.slots[loaded]
        self._row_of_slot[plan.slots[loaded]] = plan.row_ids[loaded]
        self._num_resident += len(loaded)

    def abandon(self, plan: RowPlan) -> None:
        """The plan's loads failed: the slots reserved for them are free again."""
        loaded = self._close(plan)
        self._free[self._num_free : self._num_free + len(loaded)] = plan.slots[loaded]
        self._num_free += len(loaded)
        self._bury(plan.slots[loaded])

    def _close(self, plan: RowPlan) -> npt.NDArray[np.int64]:
        if plan is not self._open_plan:
            raise IntegrityError("EMB: the row plan is not the open one")
        self._open_plan = None
        return plan.admitted

    def _bury(self, slots: npt.NDArray[np.int64]) -> None:
        if self._track_dead:
            self._dead.append(slots)

    def take_dead_slots(self) -> npt.NDArray[np.int64]:
        """Drains the slots whose row died since the last call (for poisoning them)."""
        if not self._dead:
            return _NOTHING
        dead = np.unique(np.concatenate(self._dead))
        self._dead.clear()
        return dead

    def check_integrity(self) -> None:
        """A slot maps to at most one row and back; free + reserved + occupied = all slots.

        Raises:
            IntegrityError: says which of these does not hold.
        """
        occupied = self._slots[self._row_of_slot[self._slots] != NOWHERE]
        rows = self._row_of_slot[occupied]
        if not np.array_equal(self._slot_of_row[rows], occupied):
            raise IntegrityError("EMB: a slot's row does not point back to it")
        if int(np.sum(self._slot_of_row != NOWHERE)) != len(occupied):
            raise IntegrityError("EMB: a row points to a slot that does not hold it")
        if self._num_resident != len(occupied):
            raise IntegrityError("EMB: the count of resident rows is wrong")
        free = self._free[: self._num_free]
        plan = self._open_plan
        reserved = _NOTHING if plan is None else plan.slots[plan.admitted]
        held = np.sort(np.concatenate([free, reserved, occupied]))
        if not np.array_equal(held, self._slots):
            raise IntegrityError("EMB: free, reserved and occupied slots are not all slots")


@njit(nogil=True, cache=True)
def _use(row_ids: Any, slot_of_row: Any, last_use: Any, step: Any) -> Any:
    """Looks up distinct rows and marks the slots of those that are resident as used by the step.

    Returns:
        Slots, int64 [n]; which rows are resident, bool [n]; how many are not.
    """
    slots = np.empty(len(row_ids), dtype=np.int64)
    resident = np.empty(len(row_ids), dtype=np.bool_)
    num_missing = 0
    for place in range(len(row_ids)):
        slot = slot_of_row[row_ids[place]]
        slots[place] = slot
        resident[place] = slot != NOWHERE
        if slot == NOWHERE:
            num_missing += 1
        else:
            last_use[slot] = step
    return slots, resident, num_missing

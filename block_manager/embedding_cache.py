"""The EMB tenant: which rows of a table sit in which slots of its pages.

Bookkeeping only: a step asks for its rows, gets a plan of what to load where, and the plan is
committed after the loads succeeded or abandoned after they failed. Pages come and go between steps.
All operations are batches over id arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from block_manager import row_kernels
from block_manager.exceptions import IntegrityError
from block_manager.free_slots import FreeSlots
from block_manager.page_pool import PageIds
from block_manager.row_log import RowLog
from block_manager.row_plan import NOWHERE, RefillPlan, RowMoves, RowPlan
from block_manager.row_policy import AgedFrequency, RowIds
from block_manager.slot_pages import SlotPages, slots_of

_NOTHING = np.empty(0, dtype=np.int64)

_MIN_VICTIM_WINDOW = 1024
"""Slots looked at, at least, for the coldest ones: exact for small pools, bounded for large."""
_VICTIM_WINDOW_FACTOR = 4
_PAGES_REMEMBERED = 8
"""With fewer pages counts age as with so many, or nothing would show that more are worth having."""
_REFILL_WINDOW = 1 << 16
"""Rows of the table that one call looks at for hot ones that are absent."""
_REFILL_TIERS = (16, 4, 1)
"""The hottest come first: rows that deserved a slot if there were so many times fewer."""


class EmbeddingCache:
    """Rows of one table in the pages of the EMB tenant. Slot = page * rows_per_page + place."""

    def __init__(
        self,
        page_ids: PageIds,
        rows_per_page: int,
        num_rows: int,
        num_pages: int | None = None,
        track_dead: bool = False,
        rows_stand_for: int = 1,
    ) -> None:
        """Takes the EMB tenant's pages; a dense index of `num_rows` finds rows.

        Args:
            page_ids: int64 [n], ascending.
            rows_per_page: slots of a page.
            num_rows: rows that may be asked for.
            num_pages: every page that ever comes is below it; by default none comes.
            track_dead: slots whose row died are remembered until they are drained.
            rows_stand_for: rows of a table so many times as large that one here stands for; what
                is looked at in one go is so many times less.
        """
        if num_pages is None:
            num_pages = int(page_ids.max(initial=-1)) + 1
        self._pages = SlotPages(num_pages, rows_per_page)
        num_ids = num_pages * rows_per_page
        if num_ids > np.iinfo(np.int32).max:
            raise ValueError(f"rows_per_page: {num_ids} slots are more than the index can name")
        if num_rows > np.iinfo(np.int32).max:
            raise ValueError(f"num_rows: {num_rows} rows are more than the index can name")
        self._slot_of_row = np.full(num_rows, NOWHERE, dtype=np.int32)
        self._row_of_slot = np.full(num_ids, NOWHERE, dtype=np.int32)
        self._last_use = np.zeros(num_ids, dtype=np.int64)
        self._free = FreeSlots(num_pages, rows_per_page)
        self._victim_window = -(-_MIN_VICTIM_WINDOW // rows_stand_for)
        self._refill_window = -(-_REFILL_WINDOW // rows_stand_for)
        # Counted and not derived: metrics are read while a step runs on another thread.
        self._num_resident = 0
        self.num_evictions = 0
        self.policy = AgedFrequency(num_rows, 0)
        """How hot rows are, resident ones and absent ones."""
        self._refill_hand = 0
        self._rows_to_scan = 0
        self._refill_tier = 0
        self._step = 0
        self._open_plan: RowPlan | None = None
        self._open_refill: RefillPlan | None = None
        self.row_log: RowLog | None = None
        """Where it is noted which rows come and go; None = nobody listens."""
        self._track_dead = track_dead
        self._dead: list[npt.NDArray[np.int64]] = []
        self._admit_pages(page_ids)

    def page_ids(self) -> PageIds:
        """Pages of the tenant, int64, ascending."""
        return self._pages.page_ids()

    @property
    def num_pages(self) -> int:
        """Pages of the tenant."""
        return len(self._pages)

    @property
    def num_slots(self) -> int:
        """Rows the tenant has room for."""
        return self._pages.num_slots

    @property
    def rows_per_page(self) -> int:
        """Slots of a page."""
        return self._pages.rows_per_page

    @property
    def num_rows(self) -> int:
        """Rows that may be asked for."""
        return len(self._slot_of_row)

    @property
    def is_settled(self) -> bool:
        """Whether every slot is free, holds a row or waits for a refill: no step reserves any."""
        waiting = 0 if self._open_refill is None else len(self._open_refill)
        return len(self._free) + self._num_resident + waiting == self.num_slots

    @property
    def is_refilling(self) -> bool:
        """Whether a refill is neither committed nor abandoned yet."""
        return self._open_refill is not None

    @property
    def num_resident(self) -> int:
        """Rows that are loaded and can be hit."""
        return self._num_resident

    @property
    def num_free_slots(self) -> int:
        """Slots that hold no row and wait for none."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the slots that hold rows, 0..1."""
        return self._num_resident / max(1, self.num_slots)

    def lookup(self, row_ids: RowIds) -> npt.NDArray[np.int64]:
        """Slots of rows (int64 [n]), NOWHERE for absent ones: int64 [n]. Changes nothing.

        Raises:
            IndexError: a row is not the table's.
        """
        if not row_kernels.are_within(row_ids, self.num_rows):
            raise IndexError(f"row_ids: must be within 0..{self.num_rows - 1}")
        slots: npt.NDArray[np.int64] = row_kernels.find(row_ids, self._slot_of_row)
        return slots

    @property
    def slot_of_row(self) -> npt.NDArray[np.int32]:
        """Slot of every row, NOWHERE for absent ones, int32 [num_rows]; not to be written to."""
        return self._slot_of_row

    # ---------------------------------------------------------------- a step's rows

    def plan(self, row_ids: RowIds, times: npt.NDArray[np.int64]) -> RowPlan:
        """Decides where a step's rows come from and which of the missing ones are admitted.

        No slot that the plan uses is given to another of its rows, and there is no other plan until
        it is committed or abandoned.

        Args:
            row_ids: distinct rows, int64 [n].
            times: how often the step uses each, int64 [n].
        """
        self._refuse_open_plan()
        self._step += 1
        self.policy.record(row_ids, times)
        slots, resident, num_missing = row_kernels.use(
            row_ids, self._slot_of_row, self._last_use, self._step
        )
        staging = np.full(len(row_ids), NOWHERE)
        if num_missing:
            missing = _hottest_first(self.policy, row_ids, np.flatnonzero(~resident))
            granted = self._find_slots(row_ids[missing])
            slots[missing[: len(granted)]] = granted
            self._last_use[granted] = self._step
            self._pages.reserve(granted)
            homeless = np.flatnonzero(slots == NOWHERE)
            staging[homeless] = np.arange(len(homeless))
        self._open_plan = RowPlan(row_ids, resident, slots, staging, num_missing)
        return self._open_plan

    def commit(self, plan: RowPlan) -> None:
        """The plan's loads succeeded: its admitted rows can be hit from now on."""
        loaded = self._close(plan)
        if len(loaded):
            self._settle(plan.row_ids[loaded], plan.slots[loaded])

    def abandon(self, plan: RowPlan) -> None:
        """The plan's loads failed: the slots reserved for them are free again."""
        loaded = self._close(plan)
        self._give_back(plan.slots[loaded])

    def _close(self, plan: RowPlan) -> npt.NDArray[np.int64]:
        if plan is not self._open_plan:
            raise IntegrityError("EMB: the row plan is not the open one")
        self._open_plan = None
        loaded = plan.admitted
        if len(loaded):
            self._pages.release(plan.slots[loaded])
        return loaded

    def _refuse_open_plan(self) -> None:
        if self._open_plan is not None:
            raise IntegrityError("EMB: the last step's row plan is still open")

    def _find_slots(self, row_ids: RowIds) -> npt.NDArray[np.int64]:
        """Slots for rows, hottest first: free ones, then those of colder rows, which are evicted.

        Returns:
            Slots for the first rows, int64 [at most n]; they belong to nobody now.
        """
        free = self._free.take(len(row_ids))
        rest = row_ids[len(free) :]
        if not len(rest):
            return free
        # The coldest of a window behind a moving hand, which no running step uses.
        victims = row_kernels.colder_slots(
            self._pages.next_slots(max(self._victim_window, _VICTIM_WINDOW_FACTOR * len(rest))),
            self.policy.hotness(rest),
            self.policy.counts,
            self._row_of_slot,
            self._last_use,
            self._step,
        )
        self._evict(victims)
        return np.concatenate([free, victims])

    def _evict(self, slots: npt.NDArray[np.int64]) -> None:
        """Forgets the rows of slots."""
        if self.row_log is not None:
            self.row_log.went(self._row_of_slot[slots])
        row_kernels.evict(slots, self._slot_of_row, self._row_of_slot)
        self._num_resident -= len(slots)
        self.num_evictions += len(slots)
        self._bury(slots)

    def _settle(self, row_ids: RowIds, slots: npt.NDArray[np.int64]) -> None:
        """Rows can be hit in slots from now on."""
        row_kernels.settle(row_ids, slots, self._slot_of_row, self._row_of_slot)
        if self.row_log is not None:
            self.row_log.came(row_ids)
        self._num_resident += len(slots)

    def _give_back(self, slots: npt.NDArray[np.int64]) -> None:
        self._free.put(slots)
        self._bury(slots)

    # ---------------------------------------------------------------- pages come and go

    def grow(self, page_ids: PageIds) -> None:
        """Takes pages (int64 [n]) that are not the tenant's; their slots are free at once."""
        self._admit_pages(page_ids)
        if self._track_dead:
            self._bury(slots_of(page_ids, self.rows_per_page))
        self._begin_refills()

    def _begin_refills(self) -> None:
        self._rows_to_scan, self._refill_tier = self.num_rows, 0

    def _admit_pages(self, page_ids: PageIds) -> None:
        self._pages.add(page_ids)
        self._free.put_pages(page_ids)
        self._resize_policy()

    def _resize_policy(self) -> None:
        self.policy.resize(max(self.num_slots, _PAGES_REMEMBERED * self.rows_per_page))

    def shrink(self, limit: int) -> tuple[PageIds, RowMoves]:
        """Gives up to `limit` pages away, between steps: unused ones first, then the coldest.

        Rows on them that are hotter than rows elsewhere move there; the others are evicted. A page
        on which a refill has reserved slots stays.

        Returns:
            The pages, int64 [n]; and the copies to be made before anybody writes to them.

        Raises:
            IntegrityError: a step's row plan is open.
        """
        self._refuse_open_plan()
        unused = self._free.take_pages(limit)
        self._pages.remove(unused)
        coldest = self._pages.take_coldest(
            limit - len(unused), self._row_of_slot, self.policy.counts
        )
        rows_before = self._rows_on(coldest) if self.row_log is not None else _NOTHING
        warm, vacant, num_cold = row_kernels.vacate(
            coldest,
            self.rows_per_page,
            self._slot_of_row,
            self._row_of_slot,
            self.policy.counts,
        )
        if self.row_log is not None:
            self.row_log.went(rows_before[self._slot_of_row[rows_before] == NOWHERE])
        # What was in these slots is not buried: who gets the pages does that.
        self._num_resident -= num_cold
        self.num_evictions += num_cold
        self._free.discard(vacant)
        rows = self._row_of_slot[warm]
        order = _hottest_first(self.policy, rows, np.arange(len(rows)))
        # Their own slots are no longer among the tenant's pages, so none is found there.
        destinations = self._find_slots(rows[order])
        sources, homeless = np.split(warm[order], [len(destinations)])
        row_kernels.move(
            sources, destinations, self._slot_of_row, self._row_of_slot, self._last_use
        )
        self._evict(homeless)
        self._resize_policy()
        return np.concatenate([unused, coldest]), RowMoves(sources, destinations)

    def _rows_on(self, page_ids: PageIds) -> RowIds:
        """Rows that sit on pages, int64 [n]."""
        rows = self._row_of_slot[slots_of(page_ids, self.rows_per_page)]
        resident: RowIds = rows[rows != NOWHERE].astype(np.int64)
        return resident

    def forget(self, moves: RowMoves) -> None:
        """The copies may not have been made: the rows that were moved are no longer resident."""
        held = moves.destinations[self._row_of_slot[moves.destinations] != NOWHERE]
        self._evict(held)
        self._free.put(held)

    # ---------------------------------------------------------------- refill

    @property
    def wants_refill(self) -> bool:
        """Whether pages came, slots are free, and not every row was looked at since."""
        return self._rows_to_scan > 0 and len(self._free) > 0 and self._open_refill is None

    def plan_refill(self, limit: int) -> RefillPlan | None:
        """Reserves free slots for up to `limit` of the hottest absent rows.

        Only rows that deserve a slot as the tenant is now come into question. One call looks at a
        window of the table only, and the table is gone through several times: first for rows that
        deserved one of a sixteenth of the slots.

        Returns:
            What to load, or None: nothing was found in the window, or a refill is open.
        """
        limit = min(limit, len(self._free))
        if limit < 1 or not self.wants_refill:
            return None
        found = self._find_absent(limit)
        if not len(found):
            return None
        rows = found[_hottest_first(self.policy, found, np.arange(len(found)))]
        slots = self._free.take(len(rows))
        self._pages.reserve(slots)
        self._open_refill = RefillPlan(rows, slots)
        return self._open_refill

    def _find_absent(self, limit: int) -> RowIds:
        """Up to `limit` hot rows without a slot, of the next window of the table: int64 [n]."""
        found, left = _NOTHING, self._refill_window
        while left and self._rows_to_scan and not len(found):
            found, seen = row_kernels.find_absent(
                self.policy.counts,
                self._slot_of_row,
                self.policy.deserving(self.num_slots // _REFILL_TIERS[self._refill_tier]),
                self._refill_hand,
                min(self._rows_to_scan, left),
                limit,
            )
            left -= seen
            self._refill_hand = (self._refill_hand + seen) % self.num_rows
            self._rows_to_scan -= seen
            if not self._rows_to_scan and self._refill_tier < len(_REFILL_TIERS) - 1:
                self._refill_tier += 1
                self._rows_to_scan = self.num_rows
        return found

    def commit_refill(self, refill: RefillPlan) -> None:
        """The rows are in their slots; those that a step loaded meanwhile are dropped again."""
        self._close_refill(refill)
        is_absent = self._slot_of_row[refill.row_ids] == NOWHERE
        self._settle(refill.row_ids[is_absent], refill.slots[is_absent])
        self._last_use[refill.slots[is_absent]] = self._step
        self._give_back(refill.slots[~is_absent])

    def abandon_refill(self, refill: RefillPlan) -> None:
        """The rows could not be had: the slots reserved for them are free again."""
        self._close_refill(refill)
        self._give_back(refill.slots)
        self._begin_refills()

    def _close_refill(self, refill: RefillPlan) -> None:
        if refill is not self._open_refill:
            raise IntegrityError("EMB: the refill is not the open one")
        self._open_refill = None
        self._pages.release(refill.slots)

    # ---------------------------------------------------------------- self-check

    def _bury(self, slots: npt.NDArray[np.int64]) -> None:
        if self._track_dead and len(slots):
            self._dead.append(slots)

    def take_dead_slots(self) -> npt.NDArray[np.int64]:
        """Drains the slots whose row died since the last call (for poisoning them).

        Slots that hold a row again, moved there, are not among them, nor are those of pages that
        have left: who has these now knows what they hold.
        """
        if not self._dead:
            return _NOTHING
        dead: npt.NDArray[np.int64] = np.unique(np.concatenate(self._dead))
        self._dead.clear()
        is_empty = (self._row_of_slot[dead] == NOWHERE) & self._pages.have(dead)
        return np.compress(is_empty, dead)

    def check_integrity(self) -> None:
        """A slot maps to at most one row and back; free + reserved + occupied = all slots.

        Raises:
            IntegrityError: says which of these does not hold.
        """
        occupied = np.flatnonzero(self._row_of_slot != NOWHERE)
        rows = self._row_of_slot[occupied]
        if not np.array_equal(self._slot_of_row[rows], occupied):
            raise IntegrityError("EMB: a slot's row does not point back to it")
        if int(np.sum(self._slot_of_row != NOWHERE)) != len(occupied):
            raise IntegrityError("EMB: a row points to a slot that does not hold it")
        if self._num_resident != len(occupied):
            raise IntegrityError("EMB: the count of resident rows is wrong")
        plan, refill = self._open_plan, self._open_refill
        reserved = np.concatenate(
            [
                _NOTHING if plan is None else plan.slots[plan.admitted],
                _NOTHING if refill is None else refill.slots,
            ]
        )
        held = np.sort(np.concatenate([self._free.all_free(), reserved, occupied]))
        if not np.array_equal(held, slots_of(self.page_ids(), self.rows_per_page)):
            raise IntegrityError("EMB: free, reserved and occupied slots are not all slots")
        self._pages.check_integrity(reserved)
        self.policy.check_integrity()


def _hottest_first(
    policy: AgedFrequency, row_ids: RowIds, places: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Places in `row_ids` by falling hotness of their rows, equally hot ones as they came."""
    # Bytes are sorted by their digits; others would be compared.
    order = np.argsort(~policy.hotness(row_ids[places]), kind="stable")
    ordered: npt.NDArray[np.int64] = places[order]
    return ordered

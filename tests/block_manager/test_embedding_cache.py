"""Rows in the slots of the EMB tenant: a naive model, and the self-check."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from block_manager.embedding_cache import EmbeddingCache
from block_manager.exceptions import IntegrityError
from block_manager.row_plan import NOWHERE, RowPlan

ROWS_PER_PAGE = 4
NUM_ROWS = 40

batches = st.dictionaries(st.integers(0, NUM_ROWS - 1), st.integers(1, 5), max_size=16)
"""Distinct rows of a step, and how often it uses each."""


def make_cache(pages: list[int], num_rows: int = NUM_ROWS) -> EmbeddingCache:
    page_ids = np.array(pages, dtype=np.int64)
    return EmbeddingCache(page_ids, ROWS_PER_PAGE, num_rows, track_dead=True)


def plan_rows(cache: EmbeddingCache, batch: dict[int, int]) -> RowPlan:
    rows = np.fromiter(batch.keys(), np.int64, len(batch))
    return cache.plan(rows, np.fromiter(batch.values(), np.int64, len(batch)))


class EmbeddingCacheMachine(RuleBasedStateMachine):
    """Steps with random rows. The naive model learns from each plan and judges it first."""

    @initialize(pages=st.sampled_from([[], [2], [3, 5, 8]]))
    def start(self, pages: list[int]) -> None:
        self.cache = make_cache(pages)
        self.slots = {
            page * ROWS_PER_PAGE + place for page in pages for place in range(ROWS_PER_PAGE)
        }
        self.slot_of: dict[int, int] = {}
        self.heat: Counter[int] = Counter()
        self.accesses = 0
        self.last_use: dict[int, int] = {}
        self.num_steps = 0
        self.dead: set[int] = set()
        self.open: RowPlan | None = None

    def count(self, batch: dict[int, int]) -> None:
        """TinyLFU's counts stop at 255 and are halved after ten accesses per slot of 8 pages."""
        for row, times in batch.items():
            self.heat[row] = min(255, self.heat[row] + times)
        self.accesses += sum(batch.values())
        if self.accesses >= 10 * max(8 * ROWS_PER_PAGE, len(self.slots)):
            self.accesses = 0
            self.heat = Counter({row: count // 2 for row, count in self.heat.items()})

    @precondition(lambda self: self.open is None)
    @rule(batch=batches)
    def plan(self, batch: dict[int, int]) -> None:
        self.count(batch)
        plan = self.open = plan_rows(self.cache, batch)
        rows, slots, staging = plan.row_ids.tolist(), plan.slots.tolist(), plan.staging.tolist()
        assert rows == list(batch)
        assert plan.resident.tolist() == [row in self.slot_of for row in rows]
        placed = {row: slot for row, slot in zip(rows, slots, strict=True) if slot != NOWHERE}
        staged = {row: at for row, at in zip(rows, staging, strict=True) if at != NOWHERE}
        # Exactly one place for each row, and no place for two rows.
        assert placed.keys() ^ staged.keys() == set(rows)
        assert sorted(staged.values()) == [*range(len(staged))]
        assert len(set(placed.values())) == len(placed)
        assert self.slots.issuperset(placed.values())
        hits = {row: slot for row, slot in self.slot_of.items() if row in batch}
        assert hits.items() <= placed.items()
        admitted = {row: slot for row, slot in placed.items() if row not in hits}
        self.judge_replacement(hits, admitted, [*staged])

    def judge_replacement(
        self, hits: dict[int, int], admitted: dict[int, int], homeless: list[int]
    ) -> None:
        taken = set(admitted.values())
        evicted = [row for row, slot in self.slot_of.items() if slot in taken]
        assert not set(evicted) & hits.keys()
        newcomers = sorted((self.heat[row] for row in admitted), reverse=True)
        num_free = len(self.slots) - len(self.slot_of)
        # Free slots first; then the hottest of the rest displace strictly colder rows only.
        assert len(evicted) == max(0, len(admitted) - num_free)
        displacing = newcomers[len(newcomers) - len(evicted) :]
        victims = sorted((self.heat[row], self.last_use[row]) for row in evicted)
        assert all(new > old for new, (old, _) in zip(displacing, victims, strict=True))
        # Nobody left outside is hotter than an admitted row, or than a row it could displace.
        spared = [row for row in self.slot_of if row not in evicted and row not in hits]
        hottest_outside = max((self.heat[row] for row in homeless), default=0)
        assert all(hottest_outside <= self.heat[row] for row in [*spared, *admitted])
        assert all(
            (self.heat[row], self.last_use[row]) >= max(victims, default=()) for row in spared
        )
        self.dead |= {self.slot_of.pop(row) for row in evicted}
        self.num_steps += 1
        self.last_use |= dict.fromkeys([*hits, *admitted], self.num_steps)

    @precondition(lambda self: self.open is not None)
    @rule()
    def commit(self) -> None:
        assert self.open is not None
        self.cache.commit(self.open)
        rows, slots = self.open.row_ids.tolist(), self.open.slots.tolist()
        self.slot_of |= {r: s for r, s in zip(rows, slots, strict=True) if s != NOWHERE}
        self.open = None

    @precondition(lambda self: self.open is not None)
    @rule()
    def abandon(self) -> None:
        assert self.open is not None
        self.cache.abandon(self.open)
        held = set(self.slot_of.values())
        self.dead |= {slot for slot in self.open.slots.tolist() if slot not in {NOWHERE, *held}}
        self.open = None

    @rule()
    def drain_dead_slots(self) -> None:
        # A slot that holds a row again must not be poisoned any more.
        dead = self.dead - set(self.slot_of.values())
        assert self.cache.take_dead_slots().tolist() == sorted(dead)
        self.dead.clear()

    @invariant()
    def every_lookup_equals_the_naive_one(self) -> None:
        found = self.cache.lookup(np.arange(NUM_ROWS)).tolist()
        assert found == [self.slot_of.get(row, NOWHERE) for row in range(NUM_ROWS)]

    @invariant()
    def usage_counts_rows_that_can_be_hit(self) -> None:
        assert self.cache.num_resident == len(self.slot_of)
        assert self.cache.usage == pytest.approx(len(self.slot_of) / max(1, len(self.slots)))

    @invariant()
    def books_add_up(self) -> None:
        self.cache.check_integrity()


TestEmbeddingCacheMachine = EmbeddingCacheMachine.TestCase
TestEmbeddingCacheMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


# ---------------------------------------------------------------- the protocol of plans


def test_without_pages_every_row_goes_to_staging() -> None:
    cache = make_cache([])
    plan = plan_rows(cache, {7: 1, 3: 2, 5: 1})
    assert plan.staging.tolist() == [0, 1, 2]
    assert plan.slots.tolist() == [NOWHERE] * 3
    cache.commit(plan)
    assert (cache.num_slots, cache.num_resident, cache.usage) == (0, 0, 0.0)
    cache.check_integrity()


def test_second_plan_before_the_first_is_closed_raises() -> None:
    cache = make_cache([1])
    plan = plan_rows(cache, {1: 1})
    with pytest.raises(IntegrityError, match="still open"):
        plan_rows(cache, {2: 1})
    cache.abandon(plan)
    cache.check_integrity()


def test_plan_that_was_closed_cannot_be_committed() -> None:
    cache = make_cache([1])
    plan = plan_rows(cache, {1: 1})
    cache.abandon(plan)
    with pytest.raises(IntegrityError, match="not the open one"):
        cache.commit(plan)
    cache.check_integrity()


# ---------------------------------------------------------------- pages that leave


def test_slots_of_a_page_that_has_left_are_not_among_the_dead() -> None:
    cache = make_cache([1, 2])
    cache.commit(plan_rows(cache, {row: 1 for row in range(8)}))
    cache.take_dead_slots()
    leaving, moves = cache.shrink(1)
    assert len(leaving) == 1 and len(moves) == 0
    assert cache.take_dead_slots().tolist() == []
    cache.check_integrity()


def test_pages_that_came_and_were_not_used_leave_before_any_with_a_row() -> None:
    cache = EmbeddingCache(np.array([1]), ROWS_PER_PAGE, NUM_ROWS, num_pages=9)
    cache.commit(plan_rows(cache, {row: 1 for row in range(3)}))
    cache.grow(np.array([4, 7, 8]))
    # The free slot beside other rows is used before a page is opened.
    cache.commit(plan_rows(cache, {10: 1, 11: 1}))
    assert cache.page_ids().tolist() == [1, 4, 7, 8]
    leaving, moves = cache.shrink(3)
    assert len(leaving) == 3 and 1 not in leaving
    # The row of the page that was opened has nowhere to go: no other is colder.
    assert len(moves) == 0 and cache.num_evictions == 1
    cache.check_integrity()


# ---------------------------------------------------------------- planted corruption
# The only tests here that reach into private state: no public call can break the books.


def cache_of_three_rows() -> EmbeddingCache:
    cache = make_cache([1])
    cache.commit(plan_rows(cache, {0: 1, 1: 1, 2: 1}))
    return cache


def test_self_check_finds_a_slot_whose_row_points_elsewhere() -> None:
    cache = cache_of_three_rows()
    cache._slot_of_row[0] = cache._slot_of_row[1]
    with pytest.raises(IntegrityError, match="does not point back"):
        cache.check_integrity()


def test_self_check_finds_a_row_that_points_to_a_slot_of_another() -> None:
    cache = cache_of_three_rows()
    cache._slot_of_row[9] = cache._slot_of_row[1]
    with pytest.raises(IntegrityError, match="does not hold it"):
        cache.check_integrity()


def test_self_check_finds_a_lost_slot() -> None:
    cache = cache_of_three_rows()
    cache._free.take(1)
    with pytest.raises(IntegrityError, match="are not all slots"):
        cache.check_integrity()


def test_self_check_finds_a_slot_that_is_free_and_occupied() -> None:
    cache = cache_of_three_rows()
    cache._free.put(cache.lookup(np.array([1])))
    with pytest.raises(IntegrityError, match="are not all slots"):
        cache.check_integrity()


# ---------------------------------------------------------------- refill


def test_the_hottest_absent_rows_are_refilled_first() -> None:
    cache = EmbeddingCache(np.array([], dtype=np.int64), ROWS_PER_PAGE, 200, num_pages=20)
    warm, hot = np.arange(100), np.arange(150, 154)
    cache.commit(cache.plan(warm, np.full(100, 2)))
    cache.commit(cache.plan(hot, np.full(4, 60)))
    cache.grow(np.arange(16))
    order = []
    while (refill := cache.plan_refill(4)) is not None or cache.wants_refill:
        if refill is not None:
            order += refill.row_ids.tolist()
            cache.commit_refill(refill)
        cache.check_integrity()
    assert sorted(order[:4]) == hot.tolist()
    assert len(order) == len(set(order)) <= 16 * ROWS_PER_PAGE


def test_more_slots_than_the_index_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^rows_per_page: 2147483648 slots are more than"):
        EmbeddingCache(np.array([], dtype=np.int64), 1 << 11, 10, num_pages=1 << 20)


def test_more_rows_than_a_slot_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_rows: 2147483648 rows are more than"):
        EmbeddingCache(np.array([], dtype=np.int64), 1, 1 << 31)

"""Pages change hands while both tenants work: random steps against a naive model and its memory.

The rules are what a scheduler, its clients and an executor may do, in any order that is allowed.
The model says what every page and slot must hold then, and a simulated device what they do hold:
it carries out each step in the order that `SchedulerOutput` documents, or breaks down on the way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from block_manager import embedding_cache, slot_pages
from block_manager.block_hash import NO_USER_TAG, BlockHash, hash_blocks, root_hash
from block_manager.block_pool import BlockPool
from block_manager.boundary import Boundary
from block_manager.embedding_cache import EmbeddingCache
from block_manager.embedding_tenant import EmbeddingTenant, WidthClass
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.page_pool import PagePool, Tenant
from block_manager.pool_layout import PoolLayout
from block_manager.row_plan import NOWHERE, RefillPlan, RowMoves
from tests.block_manager.plain_memory import Chunk, PlainMemory, Step
from tests.block_manager.plain_tenants import PlainEMB, PlainKV, Token

BLOCK_TOKENS, ROWS_PER_PAGE, NUM_ROWS = 4, 3, 29
LONGEST = 12
MIN_KV_PAGES = 1 + LONGEST // BLOCK_TOKENS
MAX_RUNNING = 4
REFILL_WINDOW = 9
USERS = ("ada", "bob", "eve", None)
"""The last one does not say who it is: nothing is reused."""

batches = st.tuples(
    st.integers(0, NUM_ROWS - 1),
    st.sampled_from([1, 5, 11]),
    st.integers(0, 12),
    st.integers(1, 40),
)
"""Rows of a step: the first, how far they lie apart, their number, how often the first is used."""
chunks = st.integers(0, 2 * BLOCK_TOKENS)
fates = st.sampled_from(["goes on", "is there", "failed"])
"""What has become of a refill that an earlier step began."""


def layout_of(num_pages: int, emb_fraction: float) -> PoolLayout:
    layout = PoolLayout(256, num_pages, 0, MIN_KV_PAGES, BLOCK_TOKENS, 64, ROWS_PER_PAGE, 64)
    num_emb_pages = layout.emb_pages_of(emb_fraction)
    return PoolLayout(
        256, num_pages, num_emb_pages, MIN_KV_PAGES, BLOCK_TOKENS, 64, ROWS_PER_PAGE, 64
    )


@lru_cache(maxsize=1 << 14)
def history_of(user: str, events: tuple[int, ...]) -> tuple[list[BlockHash], list[Token]]:
    """Hashes of a history's full blocks, and what each of its tokens depends on."""
    features = np.array(events, dtype=np.int64)[:, None]
    hashes = hash_blocks(root_hash("m", user.encode()), features, BLOCK_TOKENS)
    return hashes, [(user, events[: place + 1]) for place in range(len(events))]


@dataclass
class Running:
    """A request that holds blocks."""

    user: str | None
    hashes: list[BlockHash]
    tokens: list[Token]
    computed: int

    @property
    def is_done(self) -> bool:
        return self.computed == len(self.tokens)


class PoolMachine(RuleBasedStateMachine):
    """Both tenants of one pool, and all who work on them."""

    totals: ClassVar[Counter[str]] = Counter()
    """Of what happened, over all machines: a long run says how long it was and what it met."""

    @initialize(
        num_pages=st.integers(MIN_KV_PAGES, 16),
        percent=st.integers(0, 100),
        pace=st.integers(1, 5),
        looks_at_all=st.booleans(),
    )
    def start(self, num_pages: int, percent: int, pace: int, looks_at_all: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        if not looks_at_all:  # As in a pool that is much larger.
            self.patch.setattr(slot_pages, "_MIN_PAGE_WINDOW", 1)
            self.patch.setattr(slot_pages, "_PAGE_WINDOW_FACTOR", 1)
            self.patch.setattr(embedding_cache, "_MIN_VICTIM_WINDOW", 1)
            self.patch.setattr(embedding_cache, "_VICTIM_WINDOW_FACTOR", 1)
            self.patch.setattr(embedding_cache, "_REFILL_WINDOW", REFILL_WINDOW)
        layout = self.layout = layout_of(num_pages, percent / 100)
        self.pool = PagePool(layout)
        kv_pages, emb_pages = (self.pool.pages_of(tenant) for tenant in Tenant)
        blocks = BlockPool(kv_pages, num_pages, track_dead=True)
        self.kv = KVCacheManager(blocks, BLOCK_TOKENS)
        self.emb = EmbeddingCache(emb_pages, ROWS_PER_PAGE, NUM_ROWS, num_pages, track_dead=True)
        tenant = EmbeddingTenant([WidthClass(self.emb, miss_ms=1.0)])
        self.boundary = Boundary(self.pool, blocks, tenant, layout, pace)
        self.plain_kv = PlainKV(kv_pages[1:].tolist(), BLOCK_TOKENS)
        self.plain_emb = PlainEMB(set(emb_pages.tolist()), ROWS_PER_PAGE, NUM_ROWS)
        self.plain_emb.looks_at_all = looks_at_all
        if not looks_at_all:
            self.plain_emb.refill_window = REFILL_WINDOW
        self.memory = PlainMemory(num_pages, BLOCK_TOKENS, ROWS_PER_PAGE)
        self.events = {user: [place % 2 for place in range(LONGEST)] for user in USERS}
        self.running: dict[str, Running] = {}
        self.names = (f"r{number}" for number in count())
        self.open: Step | None = None
        self.moves = RowMoves()
        """Copies that the next step has to make."""
        self.planned: RefillPlan | None = None
        """A refill that the next step is to begin."""
        self.loading: RefillPlan | None = None
        """A refill that an executed step has begun."""

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
            self.totals["machines"] += 1
            self.totals["pages_moved"] += self.boundary.num_moved_pages
            self.totals["rows_moved"] += self.boundary.num_moved_rows

    # ------------------------------------------------------------ between steps

    @rule(percent=st.integers(0, 100))
    def set_target(self, percent: int) -> None:
        reached = self.boundary.set_target(percent / 100)
        num_pages = self.layout.num_pages
        wanted = min(percent * num_pages // 100, num_pages - MIN_KV_PAGES)
        assert reached == wanted / num_pages
        assert self.boundary.lag_pages == wanted - len(self.plain_emb.pages)

    @precondition(lambda self: not (self.open or self.planned or len(self.moves)))
    @rule(percents=st.lists(st.integers(0, 150), min_size=1, max_size=3))
    def move_between_steps(self, percents: list[int]) -> None:
        """As an engine without requests does, under somebody who cannot make up their mind."""
        for percent in percents:
            if percent <= 100:
                self.set_target(percent)
            self.move_boundary()
            if len(self.moves):
                break  # These copies make a step.

    def move_boundary(self) -> None:
        lag = self.boundary.lag_pages
        limit = min(abs(lag), self.boundary.max_pages_per_step)
        move = self.boundary.step()
        pages = move.page_ids.tolist()
        if lag > 0:
            assert move.to is Tenant.EMB and not move.rows
            assert pages == self.plain_kv.shrink(limit)
            self.plain_emb.grow(pages)
        elif lag < 0:
            assert move.to is Tenant.KV
            # Whatever no load is under way to can leave, so nothing but that delays a page.
            most = min(limit, len(self.plain_emb.movable()))
            assert len(pages) == most or (len(pages) < most and not self.plain_emb.looks_at_all)
            self.moves = next((one.rows for one in move.rows), RowMoves())
            self.plain_emb.shrink(pages, self.moves)
            self.plain_kv.grow(pages)
        assert len(move) == abs(lag) - abs(self.boundary.lag_pages) <= limit

    @precondition(lambda self: not self.open and len(self.running) < MAX_RUNNING)
    @rule(
        user=st.sampled_from(USERS),
        length=st.integers(1, LONGEST),
        changed=st.integers(0, 8 * LONGEST),
        recomputed=st.booleans(),
    )
    def admit(self, user: str | None, length: int, changed: int, recomputed: bool) -> None:
        if changed < LONGEST:
            self.events[user][changed] ^= 1
        events = tuple(self.events[user][:length])
        name = next(self.names)
        hashes, tokens = history_of(user or name, events)
        if user is None:
            hashes = []
        limit = length - recomputed
        wanted = self.plain_kv.ends(tokens)[: min(len(hashes), limit // BLOCK_TOKENS)]
        found_before = self.kv.pool.find_cached_prefix(hashes, limit // BLOCK_TOKENS)
        assert found_before.tolist() == self.plain_kv.find(wanted)
        cached = self.plain_kv.allocate(name, wanted, tokens)
        found = self.kv.allocate(name, hashes, length, limit)
        if cached is None:
            assert found is None
            return
        assert found == cached * BLOCK_TOKENS
        assert self.kv.block_table(name).tolist() == self.plain_kv.held[name].blocks
        self.totals["requests"] += 1
        self.totals["tokens_reused"] += found
        self.running[name] = Running(user, hashes, tokens, found)

    @precondition(lambda self: not (self.open or self.planned))
    @rule(limit=st.integers(0, 9))
    def plan_refill(self, limit: int) -> None:
        if self.boundary.lag_pages >= 0:
            self.planned = self.emb.plan_refill(limit)
            self.plain_emb.take_refill(limit, self.planned)

    # ------------------------------------------------------------ steps

    @precondition(lambda self: not self.open)
    @rule(batch=batches, chunk=chunks, refill=fates, at_once=st.booleans())
    def begin_step(
        self, batch: tuple[int, int, int, int], chunk: int, refill: str, at_once: bool
    ) -> None:
        first, stride, number, times = batch
        rows = {(first + n * stride) % NUM_ROWS: max(1, times - n) for n in range(number)}
        plan = self.emb.plan(np.array([*rows], dtype=np.int64), np.array([*rows.values()], int))
        self.plain_emb.take_plan(rows, plan)
        held = self.plain_kv.held
        self.open = Step(
            chunks=[
                Chunk(
                    name,
                    one.tokens,
                    held[name].blocks,
                    one.computed,
                    min(len(one.tokens), one.computed + chunk),
                )
                for name, one in self.running.items()
            ],
            rows=plan,
            dead_blocks=self.kv.pool.take_dead_blocks(),
            dead_slots=self.emb.take_dead_slots().tolist(),
            moves=self.moves,
            begun=self.planned,
            refilled=self.loading if refill == "is there" else None,
            refill_failed=self.loading if refill == "failed" else None,
        )
        self.moves, self.planned = RowMoves(), None
        if at_once:
            self.memory.execute(self.open)
            self.all_that_died_is_poisoned()

    @precondition(lambda self: not (self.open or self.planned or len(self.moves)))
    @rule(
        percent=st.integers(0, 250),
        batch=batches,
        chunk=chunks,
        refill=fates,
        limit=st.integers(0, 9),
    )
    def whole_step(
        self, percent: int, batch: tuple[int, int, int, int], chunk: int, refill: str, limit: int
    ) -> None:
        """What a scheduler does where nothing goes wrong; now and then with another target."""
        if percent <= 100:
            self.set_target(percent)
        self.move_boundary()
        self.plan_refill(limit)
        self.begin_step(batch, chunk, refill, at_once=True)
        self.end_step("succeeds")
        for name in [name for name, one in self.running.items() if one.is_done]:
            self.let_go(name)

    @precondition(lambda self: self.open)
    @rule(outcome=st.sampled_from([*["succeeds"] * 6, "move", "poison", "load", "end"]))
    def end_step(self, outcome: str) -> None:
        """It succeeds, or breaks down in a phase."""
        step = self.open
        assert step is not None
        if not step.is_executed:
            self.memory.execute(step, "end" if outcome == "succeeds" else outcome)
        self.open = None
        if outcome == "succeeds":
            self.commit(step)
        else:
            self.undo(step)

    def commit(self, step: Step) -> None:
        self.totals["engine_steps"] += 1
        self.emb.commit(step.rows)
        self.plain_emb.close_plan(loaded=True)
        self.loading = self.loading or step.begun
        if step.refilled is not None:
            self.totals["rows_refilled"] += len(step.refilled)
            self.emb.commit_refill(step.refilled)
        if step.refill_failed is not None:
            self.emb.abandon_refill(step.refill_failed)
        if step.refilled is not None or step.refill_failed is not None:
            self.plain_emb.close_refill(loaded=step.refilled is not None)
            self.loading = None
        for chunk in step.chunks:
            if chunk.name in self.running:
                one = self.running[chunk.name]
                one.computed = chunk.end
                ends = self.plain_kv.ends(one.tokens)[: len(one.hashes)]
                self.kv.cache_blocks(chunk.name, one.hashes, chunk.end, self.tag_of(one.user))
                self.plain_kv.cache(chunk.name, ends, chunk.end, one.user)

    def undo(self, step: Step) -> None:
        """Its requests end, its rows are not resident, and the refill it was to begin is not."""
        self.totals["engine_steps_failed"] += 1
        self.emb.abandon(step.rows)
        self.plain_emb.close_plan(loaded=False)
        self.emb.forget(step.moves)
        self.plain_emb.forget(step.moves)
        if step.begun is not None:
            self.emb.abandon_refill(step.begun)
            self.plain_emb.close_refill(loaded=False)
        for chunk in step.chunks:
            if chunk.name in self.running:
                self.let_go(chunk.name)

    # ------------------------------------------------------------ at any time

    def let_go(self, name: str) -> None:
        del self.running[name]
        self.kv.free(name)
        self.plain_kv.let_go(name)

    @rule(what=st.integers(0, 24))
    def withdraw_or_forget(self, what: int) -> None:
        """A request, or now and then what is cached of a user or of all."""
        if what < len(USERS) - 1:
            self.forget_user(USERS[what])
        elif what < len(USERS):
            assert self.kv.pool.reset_prefix_cache() == (not self.running)
            if not self.running:
                self.plain_kv.forget([*self.plain_kv.content])
        elif self.running:
            self.let_go([*self.running][what % len(self.running)])

    def forget_user(self, user: str | None) -> None:
        for one in self.running.values():
            if one.user == user:
                one.hashes = []
        content, user_of = self.plain_kv.content, self.plain_kv.user_of
        theirs = [block for block in content if user_of[block] == user]
        assert self.kv.forget_user(self.tag_of(user)) == self.plain_kv.forget(theirs)

    def tag_of(self, user: str | None) -> int:
        return NO_USER_TAG if user is None else 1 + USERS.index(user)

    # ------------------------------------------------------------ what always holds

    def all_that_died_is_poisoned(self) -> None:
        for slot in self.plain_emb.free:
            assert self.memory.row_at(slot) is None
        for block in self.plain_kv.free:
            assert block in self.plain_kv.content or not any(self.memory.tokens[block])
        # Nor is anything left of what another tenant's page once held.
        assert not any(any(self.memory.tokens[page]) for page in self.plain_emb.pages)
        rows = [row for page in self.plain_kv.readers for row in self.memory.rows[page]]
        assert not [row for row in rows if row is not None]

    @invariant()
    def books_add_up(self) -> None:
        self.totals["steps"] += 1
        self.pool.check_integrity(self.kv.pool, self.emb)
        self.kv.check_integrity()

    @invariant()
    def the_books_are_the_models(self) -> None:
        plain_kv, plain_emb = self.plain_kv, self.plain_emb
        num_pages = self.layout.num_pages
        assert self.pool.pages_of(Tenant.EMB).tolist() == sorted(plain_emb.pages)
        assert self.pool.pages_of(Tenant.KV).tolist() == [0, *sorted(plain_kv.readers)]
        assert 1 + len(plain_kv.readers) + len(plain_emb.pages) == num_pages
        assert 1 + len(plain_kv.readers) >= MIN_KV_PAGES
        assert self.kv.pool.free_block_ids().tolist() == plain_kv.free
        assert self.kv.pool.num_cached_blocks == len(plain_kv.content)
        found = self.emb.lookup(np.arange(NUM_ROWS)).tolist()
        assert found == [plain_emb.slot_of.get(row, NOWHERE) for row in range(NUM_ROWS)]
        assert self.emb.num_free_slots == len(plain_emb.free)
        assert self.emb.is_refilling == (plain_emb.refill is not None)
        assert self.emb.wants_refill == plain_emb.wants_refill

    @invariant()
    def memory_holds_what_the_books_say(self) -> None:
        if len(self.moves) or (self.open and not self.open.is_executed):
            return  # Copies are still to be made.
        for row, slot in self.plain_emb.slot_of.items():
            assert self.memory.row_at(slot) == row
        for block, (user, events) in self.plain_kv.content.items():
            begin = len(events) - BLOCK_TOKENS + 1
            held = [(user, events[:end]) for end in range(begin, len(events) + 1)]
            assert self.memory.tokens[block] == held
        for name, one in self.running.items():
            blocks = self.plain_kv.held[name].blocks
            assert self.memory.read(blocks, one.computed) == one.tokens[: one.computed]


STEPS = 200
"""Longer runs have more choices than Hypothesis keeps."""

TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=2 * settings().max_examples,
    stateful_step_count=STEPS,
    suppress_health_check=[HealthCheck.too_slow],
)

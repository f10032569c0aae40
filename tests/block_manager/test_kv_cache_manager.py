"""Block tables of running requests, against a model of plain lists and dicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from block_manager.block_hash import BlockHash, hash_blocks, root_hash
from block_manager.block_pool import BlockPool
from block_manager.exceptions import IntegrityError
from block_manager.kv_cache_manager import KVCacheManager

BLOCK_TOKENS = 2
NUM_PAGES = 9
USER = 7
"""Tag of whoever the blocks belong to, where that does not matter."""

History = tuple[int, ...]

histories = st.lists(st.integers(0, 1), min_size=1, max_size=11).map(tuple)
"""Of two items only, so that histories often share prefixes."""


def hashes_of(history: History) -> list[BlockHash]:
    """Of the blocks whose rows are final: the last row waits for the event after it."""
    features = np.array(history[:-1], dtype=np.int64).reshape(-1, 1)
    return hash_blocks(root_hash("model", b"user"), features, BLOCK_TOKENS)


def user_of(history: History) -> int:
    """Histories that share a prefix are one user's."""
    return 1 + history[0]


class NaivePool:
    """The rules once more. A page's content is the whole prefix itself, not a hash of it."""

    def __init__(self) -> None:
        self.free = list(range(1, NUM_PAGES))
        self.content: dict[int, History] = {}
        self.tables: dict[str, list[int]] = {}

    def cached_pages(self, history: History) -> list[int]:
        pages: list[int] = []
        for end in range(BLOCK_TOKENS, len(history), BLOCK_TOKENS):
            holders = [page for page, held in self.content.items() if held == history[:end]]
            if not holders:
                break
            pages.append(holders[0])
        return pages

    def allocate(self, name: str, history: History, reuse: bool) -> int | None:
        cached = self.cached_pages(history) if reuse else []
        num_new = (len(history) + BLOCK_TOKENS - 1) // BLOCK_TOKENS - len(cached)
        free = [page for page in self.free if page not in cached]
        if num_new > len(free):
            return None
        self.free = free[num_new:]
        for page in free[:num_new]:
            self.content.pop(page, None)
        self.tables[name] = cached + free[:num_new]
        return len(cached) * BLOCK_TOKENS

    def compute(self, name: str, history: History, num_computed: int) -> None:
        final = min(num_computed, len(history) - 1)
        for place, end in enumerate(range(BLOCK_TOKENS, final + 1, BLOCK_TOKENS)):
            self.content.setdefault(self.tables[name][place], history[:end])

    def finish(self, name: str) -> None:
        pages = self.tables.pop(name)[::-1]
        others = {page for table in self.tables.values() for page in table}
        freed = [page for page in pages if page not in others]
        dead = [page for page in freed if page not in self.content]
        self.free = dead + self.free + [page for page in freed if page in self.content]


def reusable_tokens(kv: KVCacheManager, hashes: list[BlockHash], max_tokens: int) -> int:
    """What a request would find, asked of the pool block by block."""
    found = 0
    for block_hash in hashes:
        if found + BLOCK_TOKENS > max_tokens or not len(
            kv.pool.find_cached_prefix([block_hash], 1)
        ):
            break
        found += BLOCK_TOKENS
    return found


class KVCacheManagerMachine(RuleBasedStateMachine):
    """Requests come, compute their rows and go; books and naive model must stay equal."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(np.arange(NUM_PAGES))
        self.kv = KVCacheManager(self.pool, BLOCK_TOKENS)
        self.naive = NaivePool()
        self.history: dict[str, History] = {}
        self.reusable: dict[str, bool] = {}

    @rule(target=running, history=histories, reusable=st.booleans())
    def allocate(self, history: History, reusable: bool) -> object:
        name = f"request-{len(self.history)}"
        hashes = hashes_of(history) if reusable else []
        found = self.kv.allocate(name, hashes, len(history), len(history) - 1)
        assert found == self.naive.allocate(name, history, reusable)
        self.history[name], self.reusable[name] = history, reusable
        return multiple() if found is None else name

    @rule(name=running, share=st.floats(0.0, 1.0))
    def compute(self, name: str, share: float) -> None:
        history = self.history[name]
        num_computed = round(share * len(history))
        hashes = hashes_of(history) if self.reusable[name] else []
        self.kv.cache_blocks(name, hashes, num_computed, user_of(history))
        if self.reusable[name]:
            self.naive.compute(name, history, num_computed)

    @rule(name=consumes(running))
    def finish(self, name: str) -> None:
        self.kv.free(name)
        self.naive.finish(name)

    @rule(user=st.sampled_from([1, 2]))
    def forget_user(self, user: int) -> None:
        """As the scheduler does: requests that run leave nothing behind either."""
        theirs = [page for page, held in self.naive.content.items() if user_of(held) == user]
        assert self.kv.forget_user(user) == len(theirs)
        for page in theirs:
            del self.naive.content[page]
        for name, history in self.history.items():
            if user_of(history) == user:
                self.reusable[name] = False

    @rule()
    def reset(self) -> None:
        assert self.pool.reset_prefix_cache() is (not self.naive.tables)
        if not self.naive.tables:
            self.naive.content.clear()

    @rule(history=histories)
    def look_up(self, history: History) -> None:
        found = reusable_tokens(self.kv, hashes_of(history), len(history) - 1)
        assert found == len(self.naive.cached_pages(history)) * BLOCK_TOKENS

    @invariant()
    def tables_are_equal(self) -> None:
        for name, pages in self.naive.tables.items():
            assert self.kv.block_table(name).tolist() == pages

    @invariant()
    def free_blocks_are_equal(self) -> None:
        assert self.pool.free_block_ids().tolist() == self.naive.free
        assert self.pool.num_free_blocks == len(self.naive.free)
        assert self.pool.num_cached_blocks == len(self.naive.content)

    @invariant()
    def books_add_up(self) -> None:
        self.pool.check_integrity()
        self.kv.check_integrity()


TestKVCacheManagerMachine = KVCacheManagerMachine.TestCase
TestKVCacheManagerMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


def make_manager(num_pages: int) -> KVCacheManager:
    return KVCacheManager(BlockPool(np.arange(num_pages)), BLOCK_TOKENS)


def check(kv: KVCacheManager) -> None:
    kv.pool.check_integrity()
    kv.check_integrity()


def test_idle_cached_blocks_are_not_counted_as_room_for_new_ones() -> None:
    kv = make_manager(num_pages=4)
    kv.allocate("first", hashes_of((1, 2, 3, 4, 5)), 5, 4)
    kv.cache_blocks("first", hashes_of((1, 2, 3, 4, 5)), 5, USER)
    kv.free("first")
    longer = (1, 2, 3, 4, 5, 6, 7)
    assert kv.pool.num_free_blocks == 3
    assert kv.allocate("second", hashes_of(longer), 7, 6) is None
    assert reusable_tokens(kv, hashes_of(longer), 6) == 4
    check(kv)


def test_prefix_is_found_up_to_the_limit_only() -> None:
    kv = make_manager(num_pages=8)
    history = (1, 2, 3, 4, 5, 6, 7)
    kv.allocate("first", hashes_of(history), 7, 6)
    kv.cache_blocks("first", hashes_of(history), 7, USER)
    assert kv.allocate("second", hashes_of(history), 7, 5) == 4
    check(kv)


def test_block_that_is_not_fully_computed_is_not_reusable() -> None:
    kv = make_manager(num_pages=8)
    history = (1, 2, 3, 4, 5, 6, 7)
    kv.allocate("first", hashes_of(history), 7, 6)
    kv.cache_blocks("first", hashes_of(history), 3, USER)
    assert kv.allocate("second", hashes_of(history), 7, 6) == 2
    check(kv)


def test_request_that_holds_blocks_cannot_allocate_again() -> None:
    kv = make_manager(num_pages=8)
    kv.allocate("first", [], 3, 2)
    with pytest.raises(IntegrityError, match="first"):
        kv.allocate("first", [], 3, 2)
    check(kv)


def test_freeing_an_unknown_request_changes_nothing() -> None:
    kv = make_manager(num_pages=8)
    kv.free("nobody")
    assert kv.pool.num_free_blocks == 7
    check(kv)


def test_requests_that_are_freed_at_once_give_back_all_blocks_each_tail_first() -> None:
    kv = make_manager(num_pages=8)
    for name, shared in (("first", 0), ("second", 4)):
        hashes = hashes_of((0, 1, 0, 1, 0, 1))
        assert kv.allocate(name, hashes, 6, 4) == shared
        kv.cache_blocks(name, hashes, 4, 1)
    first, second = (kv.block_table(name).tolist() for name in ("first", "second"))
    kv.free("first", "nobody", "second")
    assert kv.pool.num_held_blocks == 0
    # What nobody can reuse is handed out first; of a shared prefix the end, and then its beginning.
    order = kv.pool.free_block_ids().tolist()
    assert order[:2] == [first[-1], second[-1]]
    assert order[-2:] == [first[1], first[0]]
    check(kv)


def test_self_check_finds_a_block_with_a_reader_too_many() -> None:
    kv = make_manager(num_pages=8)
    kv.allocate("first", [], 3, 2)
    kv.pool.touch(np.array([1]))
    with pytest.raises(IntegrityError, match="block 1 "):
        kv.check_integrity()

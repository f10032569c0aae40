"""The block objects' pool as literal cases: vLLM's names, orders and objects."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from block_manager.block_pool import BlockPool
from block_manager.events import BlockRemoved, BlockStored
from block_manager.exceptions import IntegrityError
from block_manager.group_keys import GROUP_KEYS, group_key, group_of, hash_of
from block_manager.vllm_block_pool import HostTypes, VllmBlockPool


class ForeignBlock:
    """A class of blocks that is another's, as vLLM's is: it has places for what ours reads."""

    __slots__ = ("_block_hash", "block_id", "is_null", "next_free_block", "pool", "ref_cnt")


class LooseBlock:
    """A block that no pool made."""

    def __init__(self, block_id: int, ref_cnt: int = 1) -> None:
        self.block_id, self.ref_cnt = block_id, ref_cnt
        self.pool, self.is_null = None, False
        self.block_hash: bytes | None = None
        self.block_hash_num_tokens: int | None = None

    def set_block_hash(self, block_hash: bytes, num_tokens: int | None = None) -> None:
        self.block_hash, self.block_hash_num_tokens = block_hash, num_tokens


def make_request(num_tokens: int = 12, hash_tokens: int = 2) -> SimpleNamespace:
    tokens = list(range(num_tokens))
    ends = range(hash_tokens, num_tokens + 1, hash_tokens)
    return SimpleNamespace(
        all_token_ids=tokens,
        block_hashes=[hashlib.sha256(bytes(tokens[:end])).digest() for end in ends],
        lora_request=None,
        session_id="s",
    )


REQUEST = make_request()
A, B = group_key(b"a" * 32, 0), group_key(b"b" * 32, 0)


@pytest.fixture
def pool() -> Iterator[VllmBlockPool]:
    """A pool of the null block and blocks 1..5, hashes every 2 tokens, with events."""
    pool = VllmBlockPool(6, True, 2, enable_kv_cache_events=True)
    yield pool
    pool.books.check_integrity()


def cache_two(pool: VllmBlockPool) -> list[Any]:
    """Two blocks of 4 tokens, both reusable."""
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(REQUEST, blocks, 0, 2, 4, 0)
    return blocks


def free_order(pool: VllmBlockPool) -> list[int]:
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


# ---------------------------------------------------------------- objects


def test_blocks_are_instances_of_the_class_that_was_given() -> None:
    pool = VllmBlockPool(3, True, 2, types=HostTypes(block=ForeignBlock))
    assert all(isinstance(block, ForeignBlock) for block in pool.blocks)
    (block,) = pool.get_new_blocks(1)
    assert (block.block_id, block.ref_cnt, block.is_null, block.pool) == (1, 1, False, pool)


def test_first_block_is_the_null_block_and_is_taken(pool: VllmBlockPool) -> None:
    assert pool.null_block is pool.blocks[0]
    assert pool.null_block.is_null
    assert free_order(pool) == [1, 2, 3, 4, 5]
    assert pool.get_usage() == 0.0


def test_count_that_a_caller_changes_is_the_one_in_the_books(pool: VllmBlockPool) -> None:
    (block,) = pool.get_new_blocks(1)
    block.ref_cnt += 1
    pool.free_blocks([block])
    assert pool.books.ref_cnt[1] == 1
    assert pool.get_num_free_blocks() == 4


def test_books_given_must_be_of_the_same_blocks() -> None:
    books = BlockPool(np.arange(4), key_format=GROUP_KEYS)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        VllmBlockPool(3, True, 2, books=books)
    assert VllmBlockPool(4, True, 2, books=books).books is books


def test_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_gpu_blocks"):
        VllmBlockPool(0, True, 2)


# ---------------------------------------------------------------- the free list as blocks


def test_free_list_can_be_followed_in_both_directions(pool: VllmBlockPool) -> None:
    pool.get_new_blocks(3)
    queue = pool.free_block_queue
    head, tail = queue.fake_free_list_head, queue.fake_free_list_tail
    assert head.next_free_block is pool.blocks[4]
    assert pool.blocks[4].next_free_block is pool.blocks[5]
    assert pool.blocks[5].next_free_block is tail
    assert tail.prev_free_block is pool.blocks[5]
    assert pool.blocks[4].prev_free_block is head
    assert (head.prev_free_block, tail.next_free_block) == (None, None)
    assert pool.blocks[1].next_free_block is pool.blocks[1].prev_free_block is None


def test_ends_of_an_empty_free_list_name_each_other(pool: VllmBlockPool) -> None:
    pool.get_new_blocks(5)
    queue = pool.free_block_queue
    assert queue.fake_free_list_head.next_free_block is queue.fake_free_list_tail
    assert queue.fake_free_list_tail.prev_free_block is queue.fake_free_list_head


def test_free_list_can_be_read_from_any_block(pool: VllmBlockPool) -> None:
    queue = pool.free_block_queue
    assert [block.block_id for block in queue.iter_blocks_after(None)] == [1, 2, 3, 4, 5]
    assert [block.block_id for block in queue.iter_blocks_after(pool.blocks[3])] == [4, 5]


def test_free_list_takes_and_gives_blocks_as_vllms_does() -> None:
    pool = VllmBlockPool(6, True, 2)
    queue, blocks = pool.free_block_queue, pool.blocks
    assert queue.popleft() is blocks[1]
    assert queue.popleft_n(2) == blocks[2:4]
    queue.remove(blocks[4])
    queue.prepend_n([blocks[3], blocks[1]])
    queue.append(blocks[2])
    queue.append_n([blocks[4]])
    assert free_order(pool) == [3, 1, 5, 2, 4]
    assert queue.num_free_blocks == 5


def test_free_list_refuses_what_it_does_not_hold(pool: VllmBlockPool) -> None:
    blocks = pool.get_new_blocks(5)
    with pytest.raises(RuntimeError, match="block 1 "):
        pool.free_block_queue.remove(blocks[0])
    with pytest.raises(ValueError, match="0 are free"):
        pool.free_block_queue.popleft()


# ---------------------------------------------------------------- freeing


def test_null_block_may_be_touched_and_freed_for_nothing(pool: VllmBlockPool) -> None:
    pool.touch([pool.null_block])
    pool.free_blocks([pool.null_block, pool.null_block])
    assert free_order(pool) == [1, 2, 3, 4, 5]


def test_freeing_what_is_not_held_raises(pool: VllmBlockPool) -> None:
    with pytest.raises(IntegrityError, match="block 2 "):
        pool.free_blocks([pool.blocks[2]])


def test_block_of_another_pool_goes_back_to_it(pool: VllmBlockPool) -> None:
    other = VllmBlockPool(4, True, 2)
    mine, theirs = pool.get_new_blocks(1), other.get_new_blocks(2)
    pool.free_blocks(mine + theirs)
    assert (pool.get_num_free_blocks(), other.get_num_free_blocks()) == (5, 3)
    other.books.check_integrity()


def test_loose_block_counts_for_itself_and_is_never_free(pool: VllmBlockPool) -> None:
    loose = LooseBlock(2, ref_cnt=1)
    pool.touch([loose])
    pool.free_blocks([loose, loose])
    assert loose.ref_cnt == 0
    assert free_order(pool) == [1, 2, 3, 4, 5]


def test_without_caching_hashed_blocks_are_freed_to_the_front() -> None:
    pool = VllmBlockPool(6, False, 2)
    blocks = cache_two(pool)
    pool.free_blocks(blocks)
    assert free_order(pool) == [1, 2, 3, 4, 5]


def test_unpinned_block_is_last_to_be_handed_out_and_says_when(pool: VllmBlockPool) -> None:
    told: list[Any] = []
    blocks = pool.get_new_blocks(2)
    pool.unpin_blocks(blocks, told.append)
    assert free_order(pool) == [3, 4, 5, 1, 2]
    pool.get_new_blocks(4)
    assert told == [blocks[0]]
    pool.get_new_blocks(1)
    assert told == blocks


def test_reset_tells_of_unpinned_blocks_once(pool: VllmBlockPool) -> None:
    told: list[Any] = []
    blocks = pool.get_new_blocks(2)
    pool.unpin_blocks(blocks, told.append)
    assert pool.reset_prefix_cache()
    pool.get_new_blocks(5)
    assert told == blocks


# ---------------------------------------------------------------- keys


def test_key_is_a_hash_and_a_group() -> None:
    key = group_key(b"h" * 32, 258)
    assert key == b"h" * 32 + b"\0\0\1\2"
    assert (hash_of(key), group_of(key)) == (b"h" * 32, 258)


@pytest.mark.parametrize("length", [0, 2, 16, 32, 34])
def test_hashes_of_any_usual_length_are_told_apart(pool: VllmBlockPool, length: int) -> None:
    key, longer = group_key(b"\0" * length, 7), group_key(b"\0" * (length + 1), 7)
    index = pool.cached_block_hash_to_block
    if length < 34:
        index.insert(longer, pool.blocks[1])
    index.insert(key, pool.blocks[2])
    assert index.get_one_block(key) is pool.blocks[2]


def test_hash_that_is_too_long_is_refused(pool: VllmBlockPool) -> None:
    with pytest.raises(ValueError, match="38 bytes"):
        pool.get_cached_block(b"h" * 35, [0])


def test_content_is_found_for_its_group_only(pool: VllmBlockPool) -> None:
    blocks = cache_two(pool)
    wanted = REQUEST.block_hashes[1]
    assert pool.get_cached_block(wanted, [0]) == blocks[:1]
    assert pool.get_cached_block(wanted, [0, 1]) is None
    assert pool.get_cached_block(wanted, []) == []


def test_masked_and_null_blocks_get_no_hash(pool: VllmBlockPool) -> None:
    blocks = [*pool.get_new_blocks(2), pool.null_block]
    pool.cache_full_blocks(REQUEST, blocks, 0, 3, 4, 0, [False, True, True])
    assert [block.block_hash is None for block in blocks] == [True, False, True]


def test_block_reusable_as_a_whole_cannot_become_so_again(pool: VllmBlockPool) -> None:
    blocks = cache_two(pool)
    with pytest.raises(AssertionError):
        pool.cache_full_blocks(REQUEST, blocks, 0, 2, 4, 0)


def test_block_reusable_in_part_loses_its_keys_when_it_is_full(pool: VllmBlockPool) -> None:
    (block,) = pool.get_new_blocks(1)
    part = pool.cache_partial_block(REQUEST, block, 2, 0, 4)
    assert (block.block_hash, block.block_hash_num_tokens) == (part, 2)
    pool.cache_full_blocks(REQUEST, [block], 0, 1, 4, 0)
    assert (block.block_hash_num_tokens, pool.cached_block_hashes_by_block) == (4, {})
    assert pool.get_cached_block(REQUEST.block_hashes[0], [0]) is None


def test_full_block_is_found_in_part_by_a_further_key(pool: VllmBlockPool) -> None:
    block = cache_two(pool)[0]
    part = pool.cache_partial_block(REQUEST, block, 2, 0, 4)
    assert pool.cached_block_hashes_by_block == {1: {part}}
    assert pool.get_cached_block(REQUEST.block_hashes[0], [0]) == [block]
    pool.evict_blocks({1})
    assert pool.get_cached_block(REQUEST.block_hashes[0], [0]) is None
    assert pool.cached_block_hashes_by_block == {}


def test_null_block_is_not_reusable_in_part(pool: VllmBlockPool) -> None:
    assert pool.cache_partial_block(REQUEST, pool.null_block, 2, 0, 4) is None


@pytest.mark.parametrize("num_tokens", [3, 0, 14], ids=["between hashes", "none", "too many"])
def test_part_without_a_hash_is_refused(pool: VllmBlockPool, num_tokens: int) -> None:
    (block,) = pool.get_new_blocks(1)
    with pytest.raises(AssertionError):
        pool.cache_partial_block(REQUEST, block, num_tokens, 0, 4)


def test_only_a_held_block_without_hash_is_writable(pool: VllmBlockPool) -> None:
    hashed, _ = cache_two(pool)
    (plain,) = pool.get_new_blocks(1)
    writable = [pool.is_block_writable(block) for block in (hashed, plain, pool.null_block)]
    assert writable == [False, True, False]
    pool.touch([plain])
    assert not pool.is_block_writable(plain)


def test_further_keys_of_many_blocks_are_kept_and_given_up() -> None:
    pool = VllmBlockPool(200, True, 1)
    blocks = pool.get_new_blocks(199)
    request = make_request(199, hash_tokens=1)
    for block in blocks:
        for place in range(3):
            pool.cache_partial_block(request, block, 1 + (block.block_id + place) % 199, place, 199)
    pool.books.check_integrity()
    pool.free_blocks(blocks)
    pool.get_new_blocks(199)
    assert len(pool.cached_block_hash_to_block) == 0
    pool.books.check_integrity()


# ---------------------------------------------------------------- the index as vLLM's tests read it


def test_equal_content_is_a_dict_of_blocks_in_the_order_they_came(pool: VllmBlockPool) -> None:
    index = pool.cached_block_hash_to_block
    for block in (pool.blocks[3], pool.blocks[1]):
        block.set_block_hash(A)
        assert not index.contain(A, block.block_id)
        index.insert(A, block)
    assert index.get_one_block(A) is pool.blocks[3]
    assert list(index._cache[A]) == [3, 1]
    assert index._cache == {A: {1: pool.blocks[1], 3: pool.blocks[3]}}
    assert len(index) == 1
    assert index.pop(A, 3) is pool.blocks[3]
    assert index.pop(A, 3) is None
    assert index._cache == {A: {1: pool.blocks[1]}}
    assert index._cache == {A: pool.blocks[1]}
    assert index._cache != {A: pool.blocks[3]}


def test_entry_taken_out_of_the_index_can_be_put_back(pool: VllmBlockPool) -> None:
    block = cache_two(pool)[0]
    index, key = pool.cached_block_hash_to_block, block.block_hash
    before = copy.copy(index._cache)
    index._cache.pop(key)
    assert pool.get_cached_block(REQUEST.block_hashes[1], [0]) is None
    assert block.block_hash == key
    index._cache[key] = before[key]
    assert index._cache == before
    index._cache.clear()
    assert not index


def test_block_takes_one_hash_of_its_own(pool: VllmBlockPool) -> None:
    pool.blocks[1].set_block_hash(A, num_tokens=4)
    with pytest.raises(AssertionError, match="block 1 "):
        pool.blocks[1].set_block_hash(B)
    pool.blocks[1].reset_hash()
    assert (pool.blocks[1].block_hash, pool.blocks[1].block_hash_num_tokens) == (None, None)


def test_loose_block_can_be_made_reusable(pool: VllmBlockPool) -> None:
    loose = [LooseBlock(0), LooseBlock(1)]
    pool.cache_full_blocks(REQUEST, loose, 0, 2, 4, 0)
    assert all(block.block_hash is not None for block in loose)
    assert len(pool.cached_block_hash_to_block) == 2


# ---------------------------------------------------------------- events and metrics


def test_events_say_what_was_stored_and_what_is_gone(pool: VllmBlockPool) -> None:
    pool.free_blocks(cache_two(pool))
    hashes = [REQUEST.block_hashes[1], REQUEST.block_hashes[3]]
    stored = BlockStored(
        block_hashes=[*hashes],
        parent_block_hash=None,
        token_ids=list(range(8)),
        block_size=4,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[None, None],
        group_idx=0,
        session_id="s",
    )
    assert pool.take_events() == [stored]
    pool.get_new_blocks(5)
    removed = [BlockRemoved([one], "GPU", group_idx=0) for one in hashes]
    assert pool.take_events() == removed
    assert pool.take_events() == []


def test_event_names_the_block_before_the_stored_ones(pool: VllmBlockPool) -> None:
    blocks = cache_two(pool) + pool.get_new_blocks(1)
    pool.take_events()
    pool.cache_full_blocks(REQUEST, blocks, 2, 3, 4, 0)
    (stored,) = pool.take_events()
    assert stored.parent_block_hash == REQUEST.block_hashes[3]
    assert stored.token_ids == [8, 9, 10, 11]


def test_reused_blocks_are_reported_as_stored(pool: VllmBlockPool) -> None:
    cache_two(pool)
    pool.take_events()
    pool.emit_cached_block_events(REQUEST, 1, 4, 0)
    pool.emit_cached_block_events(REQUEST, 0, 4, 0)
    (stored,) = pool.take_events()
    assert stored.block_hashes == [REQUEST.block_hashes[1]]


def test_events_write_lora_hashes_and_extra_keys_as_the_host_does() -> None:
    types = HostTypes(
        extra_keys=lambda request, spans: [("salt", *span) for span in spans],
        external_hash=lambda block_hash: int.from_bytes(block_hash[-8:], "big"),
    )
    pool = VllmBlockPool(6, True, 2, True, medium="CPU", types=types)
    request = make_request()
    request.lora_request = SimpleNamespace(adapter_id=5, name="lora")
    pool.cache_full_blocks(request, pool.get_new_blocks(2), 1, 2, 4, 0)
    (stored,) = pool.take_events()
    assert (stored.lora_id, stored.lora_name, stored.medium) == (5, "lora", "CPU")
    assert stored.block_hashes == [int.from_bytes(request.block_hashes[3][-8:], "big")]
    assert stored.extra_keys == [("salt", 4, 8)]


def test_no_events_are_kept_unless_enabled() -> None:
    pool = VllmBlockPool(6, True, 2)
    pool.free_blocks(cache_two(pool))
    pool.get_new_blocks(5)
    assert pool.kv_event_queue == pool.take_events() == []


class Collector:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_block_allocated(self, block: Any) -> None:
        self.told.append(("allocated", block.block_id))

    def on_block_accessed(self, block: Any) -> None:
        self.told.append(("accessed", block.block_id))

    def on_block_evicted(self, block: Any) -> None:
        self.told.append(("evicted", block.block_id))

    def reset(self) -> None:
        self.told.append(("reset", -1))


def test_metrics_collector_is_told_of_every_block() -> None:
    collector = Collector()
    pool = VllmBlockPool(3, True, 2, metrics_collector=collector)
    blocks = pool.get_new_blocks(1)
    pool.touch(blocks)
    pool.free_blocks(blocks * 2)
    pool.evict_blocks({1})
    pool.reset_prefix_cache()
    assert collector.told == [
        ("evicted", 1),
        ("allocated", 1),
        ("accessed", 1),
        ("evicted", 1),
        ("reset", -1),
    ]

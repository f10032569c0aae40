"""The order rules of the KV tenant, as literal cases; vLLM 0.32's own tests pin the same orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from block_manager.block import KVCacheBlock
from block_manager.block_hash import BlockHash
from block_manager.block_pool import BlockPool
from block_manager.exceptions import IntegrityError

A, B, C = (BlockHash(letter * 32) for letter in (b"a", b"b", b"c"))


def make_pool(num_pages: int, track_dead: bool = False) -> BlockPool:
    return BlockPool(np.arange(num_pages), track_dead)


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    """A pool of the null block and blocks 1..10 whose books must add up when the test is over."""
    pool = make_pool(11)
    yield pool
    pool.check_integrity()


def ids(blocks: Sequence[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def take_hashed(pool: BlockPool, *hashes: BlockHash) -> list[KVCacheBlock]:
    blocks = pool.get_new_blocks(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.cache_block(block, block_hash)
    return blocks


def eviction_order(pool: BlockPool) -> list[int]:
    """The free blocks in the order in which they are handed out; takes them all."""
    return ids(pool.get_new_blocks(pool.num_free_blocks))


# ---------------------------------------------------------------- handing out


def test_fresh_blocks_are_handed_out_in_order_of_their_ids(pool: BlockPool) -> None:
    assert ids(pool.get_new_blocks(3)) == [1, 2, 3]
    assert ids(pool.get_new_blocks(2)) == [4, 5]


def test_null_block_is_the_first_page_and_never_handed_out() -> None:
    pool = BlockPool(np.array([4, 6, 9]))
    assert pool.null_block.block_id == 4
    assert eviction_order(pool) == [6, 9]
    pool.check_integrity()


def test_tenant_knows_its_pages_in_ascending_order() -> None:
    pool = BlockPool(np.array([0, 3, 7]))
    assert pool.page_ids().tolist() == [0, 3, 7]


def test_asking_for_too_many_blocks_raises_and_takes_none(pool: BlockPool) -> None:
    pool.get_new_blocks(4)
    with pytest.raises(ValueError, match=r"7.*6"):
        pool.get_new_blocks(7)
    assert pool.num_free_blocks == 6
    assert eviction_order(pool) == [5, 6, 7, 8, 9, 10]


def test_asking_for_no_block_takes_none(pool: BlockPool) -> None:
    assert pool.get_new_blocks(0) == []
    assert pool.num_free_blocks == 10


def test_handed_out_block_has_one_reader_and_no_content(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A))
    block = pool.get_new_blocks(10)[-1]
    assert (block.block_id, block.ref_cnt, block.block_hash) == (1, 1, None)


def test_usage_is_the_share_of_held_blocks_without_the_null_block(pool: BlockPool) -> None:
    pool.get_new_blocks(4)
    assert pool.usage == pytest.approx(0.4)


# ---------------------------------------------------------------- order of the free list


def test_unhashed_blocks_are_freed_to_the_front_in_the_given_order(pool: BlockPool) -> None:
    blocks = pool.get_new_blocks(3)
    pool.free_blocks([blocks[2], blocks[0], blocks[1]])
    assert eviction_order(pool) == [3, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_hashed_blocks_are_freed_to_the_tail_in_the_given_order(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A, B, C)[::-1])
    assert eviction_order(pool) == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]


def test_request_freed_tail_first_gives_the_order_that_vllm_pins(pool: BlockPool) -> None:
    blocks = take_hashed(pool, A, B, C) + pool.get_new_blocks(2)
    pool.free_blocks(blocks[::-1])
    assert eviction_order(pool) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]


def test_block_freed_later_is_evicted_later(pool: BlockPool) -> None:
    first, second = take_hashed(pool, A), take_hashed(pool, B)
    pool.free_blocks(second)
    pool.free_blocks(first)
    assert eviction_order(pool)[-2:] == [2, 1]


def test_block_with_another_reader_is_not_freed(pool: BlockPool) -> None:
    (block,) = take_hashed(pool, A)
    pool.touch([block])
    pool.free_blocks([block])
    assert block.ref_cnt == 1
    assert pool.num_free_blocks == 9


def test_freeing_a_free_block_raises(pool: BlockPool) -> None:
    (block,) = pool.get_new_blocks(1)
    pool.free_blocks([block])
    with pytest.raises(IntegrityError, match="block 1 "):
        pool.free_blocks([block])


def test_freeing_the_null_block_raises(pool: BlockPool) -> None:
    with pytest.raises(IntegrityError, match="block 0 "):
        pool.free_blocks([pool.null_block])


# ---------------------------------------------------------------- reusable content


def test_freed_content_stays_reusable_until_its_block_is_handed_out_again() -> None:
    pool = make_pool(4)
    pool.free_blocks(take_hashed(pool, A))
    pool.get_new_blocks(2)
    assert pool.get_cached_block(A) is not None
    pool.get_new_blocks(1)
    assert pool.get_cached_block(A) is None
    pool.check_integrity()


def test_content_of_a_held_block_is_reusable(pool: BlockPool) -> None:
    (block,) = take_hashed(pool, A)
    assert pool.get_cached_block(A) is block


def test_lookup_of_content_never_cached_finds_nothing(pool: BlockPool) -> None:
    take_hashed(pool, A)
    assert pool.get_cached_block(B) is None


def test_touch_takes_a_block_off_the_free_list(pool: BlockPool) -> None:
    blocks = take_hashed(pool, A, B)
    pool.free_blocks(blocks)
    pool.touch([blocks[0]])
    assert pool.num_free_blocks == 9
    assert eviction_order(pool) == [3, 4, 5, 6, 7, 8, 9, 10, 2]


def test_touched_and_freed_block_becomes_the_last_to_be_evicted(pool: BlockPool) -> None:
    blocks = take_hashed(pool, A, B)
    pool.free_blocks(blocks)
    pool.touch([blocks[0]])
    pool.free_blocks([blocks[0]])
    assert eviction_order(pool)[-2:] == [2, 1]


def test_of_two_blocks_with_equal_content_the_first_cached_wins(pool: BlockPool) -> None:
    first, second = pool.get_new_blocks(2)
    pool.cache_block(second, A)
    pool.cache_block(first, A)
    assert pool.get_cached_block(A) is second
    assert pool.num_cached_blocks == 2


def test_copy_serves_on_when_the_first_block_of_that_content_is_evicted() -> None:
    pool = make_pool(3)
    first, second = take_hashed(pool, A, A)
    pool.free_blocks([first])
    pool.get_new_blocks(1)
    assert pool.get_cached_block(A) is second
    pool.check_integrity()


@pytest.mark.parametrize("state", ["hashed", "free", "null"])
def test_hash_is_refused_for_a_block_that_cannot_take_one(pool: BlockPool, state: str) -> None:
    block = pool.null_block
    if state == "hashed":
        (block,) = take_hashed(pool, A)
    elif state == "free":
        (block,) = pool.get_new_blocks(1)
        pool.free_blocks([block])
    with pytest.raises(IntegrityError, match=f"block {block.block_id} "):
        pool.cache_block(block, B)


# ---------------------------------------------------------------- reset


def test_reset_of_an_idle_pool_forgets_all_content(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A, B))
    assert pool.reset_prefix_cache()
    assert pool.get_cached_block(A) is None
    assert pool.num_cached_blocks == 0


def test_reset_while_a_block_is_held_does_nothing(pool: BlockPool) -> None:
    (block,) = take_hashed(pool, A)
    assert not pool.reset_prefix_cache()
    assert pool.get_cached_block(A) is block


# ---------------------------------------------------------------- dead blocks


def test_freed_block_without_hash_is_dead_at_once() -> None:
    pool = make_pool(4, track_dead=True)
    pool.free_blocks(pool.get_new_blocks(2))
    assert pool.take_dead_blocks() == [1, 2]
    pool.check_integrity()


def test_freed_block_with_hash_is_dead_once_it_is_handed_out_again() -> None:
    pool = make_pool(2, track_dead=True)
    pool.free_blocks(take_hashed(pool, A))
    assert pool.take_dead_blocks() == []
    pool.get_new_blocks(1)
    assert pool.take_dead_blocks() == [1]
    pool.check_integrity()


def test_reset_makes_all_reusable_blocks_dead() -> None:
    pool = make_pool(4, track_dead=True)
    pool.free_blocks(take_hashed(pool, A, B))
    pool.reset_prefix_cache()
    assert pool.take_dead_blocks() == [1, 2]
    pool.check_integrity()


def test_dead_blocks_are_reported_once() -> None:
    pool = make_pool(4, track_dead=True)
    pool.free_blocks(pool.get_new_blocks(1))
    pool.take_dead_blocks()
    assert pool.take_dead_blocks() == []
    pool.check_integrity()


def test_dead_blocks_are_not_remembered_unless_asked_for(pool: BlockPool) -> None:
    pool.free_blocks(pool.get_new_blocks(2))
    assert pool.take_dead_blocks() == []


# ---------------------------------------------------------------- self-check


def test_self_check_finds_a_held_block_without_readers() -> None:
    pool = make_pool(4)
    pool.get_new_blocks(1)[0].ref_cnt = 0
    with pytest.raises(IntegrityError, match="block 1 "):
        pool.check_integrity()


def test_self_check_finds_a_free_block_with_a_reader() -> None:
    pool = make_pool(4)
    pool.blocks[2].ref_cnt = 1
    with pytest.raises(IntegrityError, match="block 2 "):
        pool.check_integrity()


def test_self_check_finds_a_hash_that_no_lookup_finds() -> None:
    pool = make_pool(4)
    pool.get_new_blocks(1)[0].block_hash = A
    with pytest.raises(IntegrityError, match="block 1 "):
        pool.check_integrity()


def test_self_check_finds_an_indexed_block_that_lost_its_hash() -> None:
    pool = make_pool(4)
    take_hashed(pool, A)[0].block_hash = None
    with pytest.raises(IntegrityError, match="hash index"):
        pool.check_integrity()

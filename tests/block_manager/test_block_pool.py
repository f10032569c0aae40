"""The order rules of the KV tenant, as literal cases; vLLM 0.32's own tests pin the same orders."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from block_manager.block_hash import BlockHash
from block_manager.block_pool import BlockPool
from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds

A, B, C = (BlockHash(letter * 32) for letter in (b"a", b"b", b"c"))


def make_pool(num_pages: int, track_dead: bool = False) -> BlockPool:
    return BlockPool(np.arange(num_pages), track_dead=track_dead)


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    """A pool of the null block and blocks 1..10 whose books must add up when the test is over."""
    pool = make_pool(11)
    yield pool
    pool.check_integrity()


def ids(*block_ids: int) -> PageIds:
    return np.array(block_ids, dtype=np.int64)


def take_hashed(pool: BlockPool, *hashes: BlockHash) -> PageIds:
    blocks = pool.get_new_blocks(len(hashes))
    pool.cache_blocks(blocks, hashes)
    return blocks


def holder_of(pool: BlockPool, block_hash: BlockHash) -> int | None:
    """The block that serves this content."""
    found = pool.find_cached_prefix([block_hash], 1).tolist()
    return found[0] if found else None


def eviction_order(pool: BlockPool) -> list[int]:
    """The free blocks in the order in which they are handed out; takes them all."""
    order: list[int] = pool.get_new_blocks(pool.num_free_blocks).tolist()
    return order


# ---------------------------------------------------------------- handing out


def test_fresh_blocks_are_handed_out_in_order_of_their_ids(pool: BlockPool) -> None:
    assert pool.get_new_blocks(3).tolist() == [1, 2, 3]
    assert pool.get_new_blocks(2).tolist() == [4, 5]


def test_null_block_is_the_first_page_and_never_handed_out() -> None:
    pool = BlockPool(np.array([4, 6, 9]))
    assert pool.null_block == 4
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


def test_asking_for_a_negative_number_of_blocks_raises(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match="-1"):
        pool.get_new_blocks(-1)


def test_asking_for_no_block_takes_none(pool: BlockPool) -> None:
    assert pool.get_new_blocks(0).tolist() == []
    assert pool.num_free_blocks == 10


def test_handed_out_block_has_one_reader_and_no_content(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A))
    block = pool.get_new_blocks(10)[-1]
    assert (block, pool.ref_cnt[block], holder_of(pool, A)) == (1, 1, None)
    assert pool.num_evictions == 1


def test_usage_is_the_share_of_held_blocks_without_the_null_block(pool: BlockPool) -> None:
    pool.get_new_blocks(4)
    assert pool.num_held_blocks == 4
    assert pool.usage == pytest.approx(0.4)


# ---------------------------------------------------------------- order of the free list


def test_unhashed_blocks_are_freed_to_the_front_in_the_given_order(pool: BlockPool) -> None:
    pool.get_new_blocks(3)
    pool.free_blocks(ids(3, 1, 2))
    assert eviction_order(pool) == [3, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_hashed_blocks_are_freed_to_the_tail_in_the_given_order(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A, B, C)[::-1])
    assert eviction_order(pool) == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]


def test_request_freed_tail_first_gives_the_order_that_vllm_pins(pool: BlockPool) -> None:
    blocks = np.concatenate([take_hashed(pool, A, B, C), pool.get_new_blocks(2)])
    pool.free_blocks(blocks[::-1])
    assert eviction_order(pool) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]


def test_block_freed_later_is_evicted_later(pool: BlockPool) -> None:
    first, second = take_hashed(pool, A), take_hashed(pool, B)
    pool.free_blocks(second)
    pool.free_blocks(first)
    assert eviction_order(pool)[-2:] == [2, 1]


def test_order_can_be_read_without_taking_the_blocks(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A))
    assert pool.free_block_ids().tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 1]
    assert pool.num_free_blocks == 10


def test_block_with_another_reader_is_not_freed(pool: BlockPool) -> None:
    block = take_hashed(pool, A)
    pool.touch(block)
    pool.free_blocks(block)
    assert pool.ref_cnt[block] == 1
    assert pool.num_free_blocks == 9


def test_block_given_twice_loses_two_readers_and_goes_where_it_came_last(pool: BlockPool) -> None:
    take_hashed(pool, A, B)
    pool.touch(ids(1))
    pool.free_blocks(ids(1, 2, 1))
    assert eviction_order(pool)[-2:] == [2, 1]


@pytest.mark.parametrize(
    ("freed", "culprit"),
    [
        ([1, 3], 3),
        ([1, 2, 1], 1),
        ([2, 0], 0),
        ([1, 11], 11),
        ([1, -1], -1),
    ],
    ids=["free", "over-freed", "null", "no such page", "negative"],
)
def test_freeing_what_is_not_held_that_often_raises_and_changes_nothing(
    pool: BlockPool, freed: list[int], culprit: int
) -> None:
    take_hashed(pool, A, B)
    with pytest.raises(IntegrityError, match=f"block {culprit} "):
        pool.free_blocks(ids(*freed))
    assert pool.ref_cnt[:4].tolist() == [0, 1, 1, 0]
    assert pool.free_block_ids().tolist() == [3, 4, 5, 6, 7, 8, 9, 10]


def test_page_of_another_tenant_is_no_block() -> None:
    pool = BlockPool(np.array([2, 3, 5]))
    for operation in (pool.free_blocks, pool.touch):
        with pytest.raises(IntegrityError, match="block 4 "):
            operation(ids(4))
    pool.check_integrity()


def test_null_block_may_be_read_but_is_never_freed_nor_reusable(pool: BlockPool) -> None:
    pool.touch(ids(0))
    assert pool.num_free_blocks == 10
    with pytest.raises(IntegrityError, match="block 0 "):
        pool.free_blocks(ids(0))
    with pytest.raises(IntegrityError, match="block 0 "):
        pool.cache_blocks(ids(0), [A])


# ---------------------------------------------------------------- reusable content


def test_freed_content_stays_reusable_until_its_block_is_handed_out_again() -> None:
    pool = make_pool(4)
    pool.free_blocks(take_hashed(pool, A))
    pool.get_new_blocks(2)
    assert holder_of(pool, A) == 1
    pool.get_new_blocks(1)
    assert holder_of(pool, A) is None
    pool.check_integrity()


def test_content_of_a_held_block_is_reusable(pool: BlockPool) -> None:
    take_hashed(pool, A)
    assert holder_of(pool, A) == 1


def test_lookup_of_content_never_cached_finds_nothing(pool: BlockPool) -> None:
    take_hashed(pool, A)
    assert holder_of(pool, B) is None


def test_lookup_ends_at_the_first_content_that_is_not_there(pool: BlockPool) -> None:
    take_hashed(pool, A, C)
    assert pool.find_cached_prefix([A, B, C], 3).tolist() == [1]


def test_lookup_ends_at_its_limit(pool: BlockPool) -> None:
    take_hashed(pool, A, B, C)
    assert pool.find_cached_prefix([A, B, C], 2).tolist() == [1, 2]


def test_touch_takes_a_block_off_the_free_list(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A, B))
    pool.touch(ids(1))
    assert pool.num_free_blocks == 9
    assert eviction_order(pool) == [3, 4, 5, 6, 7, 8, 9, 10, 2]


def test_block_touched_twice_at_once_has_two_readers(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A))
    pool.touch(ids(1, 1))
    assert pool.ref_cnt[1] == 2
    assert pool.num_free_blocks == 9


def test_touched_and_freed_block_becomes_the_last_to_be_evicted(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A, B))
    pool.touch(ids(1))
    pool.free_blocks(ids(1))
    assert eviction_order(pool)[-2:] == [2, 1]


def test_of_two_blocks_with_equal_content_the_first_cached_wins(pool: BlockPool) -> None:
    first, second = pool.get_new_blocks(2)
    pool.cache_blocks(ids(second, first), [A, A])
    assert holder_of(pool, A) == second
    assert pool.num_cached_blocks == 2


def test_copy_serves_on_when_the_first_block_of_that_content_is_evicted() -> None:
    pool = make_pool(3)
    take_hashed(pool, A, A)
    pool.free_blocks(ids(1))
    pool.get_new_blocks(1)
    assert holder_of(pool, A) == 2
    pool.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "culprit"),
    [
        ([2, 1], 1),
        ([2, 2], 2),
        ([2, 3], 3),
        ([2, 0], 0),
        ([2, 11], 11),
        ([2, -1], -1),
    ],
    ids=["hashed", "twice", "free", "null", "no such page", "negative"],
)
def test_hashes_are_refused_when_a_block_cannot_take_one(
    pool: BlockPool, blocks: list[int], culprit: int
) -> None:
    take_hashed(pool, A)
    pool.get_new_blocks(1)
    with pytest.raises(IntegrityError, match=f"block {culprit} "):
        pool.cache_blocks(ids(*blocks), [B, C])
    assert pool.num_cached_blocks == 1
    assert (holder_of(pool, A), holder_of(pool, B), holder_of(pool, C)) == (1, None, None)


# ---------------------------------------------------------------- reset


def test_reset_of_an_idle_pool_forgets_all_content(pool: BlockPool) -> None:
    pool.free_blocks(take_hashed(pool, A, B))
    assert pool.reset_prefix_cache()
    assert holder_of(pool, A) is None
    assert pool.num_cached_blocks == 0
    assert pool.num_evictions == 0


def test_reset_while_a_block_is_held_does_nothing(pool: BlockPool) -> None:
    take_hashed(pool, A)
    assert not pool.reset_prefix_cache()
    assert holder_of(pool, A) == 1


# ---------------------------------------------------------------- dead blocks


def test_freed_block_without_hash_is_dead_at_once() -> None:
    pool = make_pool(4, track_dead=True)
    pool.free_blocks(pool.get_new_blocks(2))
    assert pool.take_dead_blocks() == [1, 2]
    pool.check_integrity()


def test_block_with_another_reader_is_not_dead() -> None:
    pool = make_pool(4, track_dead=True)
    block = pool.get_new_blocks(1)
    pool.touch(block)
    pool.free_blocks(block)
    assert pool.take_dead_blocks() == []
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
    pool.free_blocks(pool.get_new_blocks(1))
    assert pool.take_dead_blocks() == [1]
    assert pool.take_dead_blocks() == []
    pool.check_integrity()


def test_dead_blocks_are_not_remembered_unless_asked_for(pool: BlockPool) -> None:
    pool.free_blocks(pool.get_new_blocks(2))
    assert pool.take_dead_blocks() == []


# ---------------------------------------------------------------- self-check


def test_self_check_finds_a_held_block_without_readers() -> None:
    pool = make_pool(4)
    pool.ref_cnt[pool.get_new_blocks(1)] = 0
    with pytest.raises(IntegrityError, match="block 1 "):
        pool.check_integrity()


def test_self_check_finds_a_free_block_with_a_reader() -> None:
    pool = make_pool(4)
    pool.ref_cnt[2] = 1
    with pytest.raises(IntegrityError, match="block 2 "):
        pool.check_integrity()


# ---------------------------------------------------------------- pages that leave


def test_a_page_that_has_left_is_not_among_the_dead() -> None:
    # It would be poisoned as a block after rows were moved there.
    pool = make_pool(5, track_dead=True)
    blocks = take_hashed(pool, A, B)
    pool.free_blocks(blocks)
    leaving = pool.shrink(3).tolist()
    assert sorted(leaving) == [1, 3, 4]
    assert pool.take_dead_blocks() == []
    assert holder_of(pool, B) == 2
    pool.check_integrity()

"""The linked list under the free blocks: taking out of the middle, and its self-check."""

from __future__ import annotations

import numpy as np
import pytest

from block_manager.exceptions import IntegrityError
from block_manager.free_queue import FreeKVCacheBlockQueue


@pytest.fixture
def queue() -> FreeKVCacheBlockQueue:
    """Blocks 1..5 of eight ids."""
    return FreeKVCacheBlockQueue(np.arange(1, 6), num_ids=8)


@pytest.mark.parametrize(
    ("removed", "left"),
    [
        ([1], [2, 3, 4, 5]),
        ([5], [1, 2, 3, 4]),
        ([3], [1, 2, 4, 5]),
        ([4, 2, 3], [1, 5]),
        ([3, 1, 5, 4, 2], []),
    ],
)
def test_blocks_are_taken_out_wherever_they_stand(
    queue: FreeKVCacheBlockQueue, removed: list[int], left: list[int]
) -> None:
    queue.remove(np.array(removed))
    assert queue.get_all_free_blocks().tolist() == left
    assert queue.num_free_blocks == len(left)
    assert np.flatnonzero(queue.check_integrity()).tolist() == left


def test_taking_a_block_out_that_is_not_in_raises_and_takes_none(
    queue: FreeKVCacheBlockQueue,
) -> None:
    with pytest.raises(ValueError, match="block 6 "):
        queue.remove(np.array([2, 6]))
    assert queue.get_all_free_blocks().tolist() == [1, 2, 3, 4, 5]


def test_emptied_list_takes_blocks_at_both_ends(queue: FreeKVCacheBlockQueue) -> None:
    queue.popleft_n(5)
    queue.prepend_n(np.array([4, 2]))
    queue.append_n(np.array([3, 7]))
    queue.prepend_n(np.array([1]))
    assert queue.get_all_free_blocks().tolist() == [1, 4, 2, 3, 7]
    queue.check_integrity()


def test_self_check_finds_a_miscount(queue: FreeKVCacheBlockQueue) -> None:
    queue.num_free_blocks -= 1
    with pytest.raises(IntegrityError, match="miscounted"):
        queue.check_integrity()


def test_self_check_finds_a_link_that_is_not_returned(queue: FreeKVCacheBlockQueue) -> None:
    queue._next[2] = 4
    with pytest.raises(IntegrityError, match="block 2 "):
        queue.check_integrity()


def test_self_check_finds_a_block_linked_in_one_direction(queue: FreeKVCacheBlockQueue) -> None:
    queue._prev[3] = -1
    with pytest.raises(IntegrityError, match="half"):
        queue.check_integrity()


def test_self_check_finds_a_ring_beside_the_list(queue: FreeKVCacheBlockQueue) -> None:
    queue.remove(np.array([2, 3]))
    queue._next[2] = queue._prev[2] = 3
    queue._next[3] = queue._prev[3] = 2
    queue.num_free_blocks += 2
    with pytest.raises(IntegrityError, match="in pieces"):
        queue.check_integrity()

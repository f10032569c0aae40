"""The free list of KV blocks, in eviction order, with O(1) removal from the middle.

The order rules are those of vLLM's `FreeKVCacheBlockQueue` (v1/core/kv_cache_utils.py). The list
is doubly linked through two arrays over block ids instead of through objects: a request of
thousands of tokens has hundreds of blocks, and they are moved in one call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds

_UNLINKED = -1


class FreeKVCacheBlockQueue:
    """Linked through arrays that are indexed by block id, between two sentinels."""

    def __init__(self, block_ids: PageIds, num_ids: int) -> None:
        """Takes the free blocks in eviction order; every id that ever comes is below `num_ids`."""
        self.num_free_blocks = 0
        self._head, self._tail = num_ids, num_ids + 1
        self._next = np.full(num_ids + 2, _UNLINKED, dtype=np.int32)
        self._prev = np.full(num_ids + 2, _UNLINKED, dtype=np.int32)
        self._next[self._head] = self._tail
        self._prev[self._tail] = self._head
        self.append_n(block_ids)

    def popleft_n(self, n: int) -> PageIds:
        """Takes the n blocks that are first in eviction order: int64 [n].

        Raises:
            ValueError: fewer than n are free, or n is negative.
        """
        if not 0 <= n <= self.num_free_blocks:
            raise ValueError(f"cannot take {n} blocks: {self.num_free_blocks} are free")
        block_ids = self._first_n(n)
        self.remove(block_ids)
        return block_ids

    def remove(self, block_ids: PageIds) -> None:
        """Takes distinct blocks out, wherever they stand; int64 [n].

        Raises:
            ValueError: a block is not in the list; none is taken.
        """
        stranger = _unlink(self._next, self._prev, block_ids)
        if stranger != _UNLINKED:
            raise ValueError(f"block {stranger} is not in the free list")
        self.num_free_blocks -= len(block_ids)

    def append_n(self, block_ids: PageIds) -> None:
        """Puts blocks at the tail, in the given order: they are evicted last; int64 [n]."""
        self._insert(int(self._prev[self._tail]), block_ids)

    def prepend_n(self, block_ids: PageIds) -> None:
        """Puts blocks at the head, in the given order: they are evicted first; int64 [n]."""
        self._insert(self._head, block_ids)

    def _insert(self, place: int, block_ids: PageIds) -> None:
        _link(self._next, self._prev, place, block_ids)
        self.num_free_blocks += len(block_ids)

    def get_all_free_blocks(self) -> PageIds:
        """All blocks of the list in eviction order, int64."""
        return self._first_n(self.num_free_blocks)

    def _first_n(self, n: int) -> PageIds:
        block_ids: PageIds = _walk(self._next, self._head, n)
        return block_ids

    def check_integrity(self) -> npt.NDArray[np.bool_]:
        """Both directions of the list agree and it is as long as it is counted.

        Returns:
            Which ids are in the list, bool [num_ids].

        Raises:
            IntegrityError: names the block.
        """
        is_linked: npt.NDArray[np.bool_] = self._next[: self._head] != _UNLINKED
        if not np.array_equal(is_linked, self._prev[: self._head] != _UNLINKED):
            raise IntegrityError("KV: a block is half in the free list")
        linked = np.append(np.flatnonzero(is_linked), self._head)
        after = self._next[linked]
        broken = np.flatnonzero(self._prev[after] != linked)
        if len(broken):
            raise IntegrityError(f"KV: block {linked[broken[0]]} does not follow in the free list")
        # The links pair off by now, so what is linked but not met on the way is a ring of its own.
        met = len(linked) - 1
        last = self._first_n(met)[-1] if met else self._head
        if met != self.num_free_blocks or self._next[last] != self._tail:
            raise IntegrityError("KV: the free list is miscounted or in pieces")
        return is_linked


@njit(cache=True, nogil=True)
def _walk(following: Any, place: Any, n: Any) -> Any:
    """The n blocks after a place."""
    block_ids = np.empty(n, dtype=np.int64)
    for i in range(n):
        place = following[place]
        block_ids[i] = place
    return block_ids


@njit(cache=True, nogil=True)
def _link(following: Any, preceding: Any, place: Any, block_ids: Any) -> None:
    """Puts blocks after a place, in the given order."""
    after = following[place]
    for block in block_ids:
        following[place] = block
        preceding[block] = place
        place = block
    following[place] = after
    preceding[after] = place


@njit(cache=True, nogil=True)
def _unlink(following: Any, preceding: Any, block_ids: Any) -> Any:
    """Takes blocks out of the list, or none and returns the first that is not in it."""
    for block in block_ids:
        if following[block] == _UNLINKED:
            return block
    for block in block_ids:
        following[preceding[block]] = following[block]
        preceding[following[block]] = preceding[block]
        following[block] = preceding[block] = _UNLINKED
    return _UNLINKED

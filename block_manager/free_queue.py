"""The free list of KV blocks, in eviction order, with O(1) removal from the middle.

The order rules are those of vLLM's `FreeKVCacheBlockQueue` (v1/core/kv_cache_utils.py). The list
is doubly linked through two arrays over block ids instead of through objects: a request of
thousands of tokens has hundreds of blocks, and they are moved in one call.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from block_manager import kv_kernels
from block_manager.exceptions import IntegrityError
from block_manager.kv_kernels import UNLINKED, FreeList
from block_manager.page_pool import PageIds


class FreeKVCacheBlockQueue:
    """Linked through arrays that are indexed by block id, between two sentinels."""

    def __init__(self, block_ids: PageIds, num_ids: int) -> None:
        """Takes the free blocks in eviction order; every id that ever comes is below `num_ids`."""
        self.num_free_blocks = 0
        self._head, self._tail = num_ids, num_ids + 1
        self._next = np.full(num_ids + 2, UNLINKED, dtype=np.int32)
        self._prev = np.full(num_ids + 2, UNLINKED, dtype=np.int32)
        self.links = FreeList(self._next, self._prev)
        """What kernels work on; whoever lets one do so counts `num_free_blocks` too."""
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
        block_ids = self.first_n(n)
        self.remove(block_ids)
        return block_ids

    def remove(self, block_ids: PageIds) -> None:
        """Takes distinct blocks out, wherever they stand; int64 [n].

        Raises:
            ValueError: a block is not in the list; none is taken.
        """
        stranger = kv_kernels.unlink(self.links, block_ids)
        if stranger != UNLINKED:
            raise ValueError(f"block {stranger} is not in the free list")
        self.num_free_blocks -= len(block_ids)

    def append_n(self, block_ids: PageIds) -> None:
        """Puts blocks at the tail, in the given order: they are evicted last; int64 [n]."""
        self._insert(int(self._prev[self._tail]), block_ids)

    def prepend_n(self, block_ids: PageIds) -> None:
        """Puts blocks at the head, in the given order: they are evicted first; int64 [n]."""
        self._insert(self._head, block_ids)

    def _insert(self, place: int, block_ids: PageIds) -> None:
        kv_kernels.link(self.links, place, block_ids)
        self.num_free_blocks += len(block_ids)

    def get_all_free_blocks(self) -> PageIds:
        """All blocks of the list in eviction order, int64."""
        return self.first_n(self.num_free_blocks)

    def first_n(self, n: int) -> PageIds:
        """The first n blocks of the list, which holds as many, int64 [n]."""
        block_ids: PageIds = kv_kernels.walk(self.links, self._head, n)
        return block_ids

    def check_integrity(self) -> npt.NDArray[np.bool_]:
        """Both directions of the list agree and it is as long as it is counted.

        Returns:
            Which ids are in the list, bool [num_ids].

        Raises:
            IntegrityError: names the block.
        """
        is_linked: npt.NDArray[np.bool_] = self._next[: self._head] != UNLINKED
        if not np.array_equal(is_linked, self._prev[: self._head] != UNLINKED):
            raise IntegrityError("KV: a block is half in the free list")
        linked = np.append(np.flatnonzero(is_linked), self._head)
        after = self._next[linked]
        broken = np.flatnonzero(self._prev[after] != linked)
        if len(broken):
            raise IntegrityError(f"KV: block {linked[broken[0]]} does not follow in the free list")
        # The links pair off by now, so what is linked but not met on the way is a ring of its own.
        met = len(linked) - 1
        last = self.first_n(met)[-1] if met else self._head
        if met != self.num_free_blocks or self._next[last] != self._tail:
            raise IntegrityError("KV: the free list is miscounted or in pieces")
        return is_linked

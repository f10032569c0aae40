"""The KV tenant's pages: reference counts, reusable content by hash, lazy eviction in LRU order.

Semantics follow vLLM 0.32's `BlockPool` (v1/core/block_pool.py). A block is *used* while requests
refer to it; otherwise it is in the free list, and if it carries a hash its content stays
reusable until the block is handed out again. A block's id is its page; all operations take and
return arrays of ids, int64 [n], and an operation that raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from block_manager.block_hash import BlockHash
from block_manager.block_hash_map import BlockHashToBlockMap
from block_manager.exceptions import IntegrityError
from block_manager.free_queue import FreeKVCacheBlockQueue
from block_manager.page_pool import PageIds

_NOT_OURS = -1
_NONE_BAD = -1


class BlockPool:
    """Owns the blocks of the KV tenant. The first page is the null block and never handed out."""

    def __init__(self, page_ids: PageIds, track_dead: bool = False) -> None:
        """Takes the KV tenant's pages, ascending; all but the null block start free.

        With `track_dead`, pages whose content died are remembered until they are drained.
        """
        self._pages = np.ascontiguousarray(page_ids, dtype=np.int64)
        self.null_block = int(page_ids[0])
        """Id of the null block."""
        num_ids = int(page_ids[-1]) + 1
        self.ref_cnt = np.full(num_ids, _NOT_OURS, dtype=np.int32)
        """Running requests that read or write each block, by block id; below 0 where the page is
        not the tenant's."""
        self.ref_cnt[self._pages] = 0
        self._free = FreeKVCacheBlockQueue(self._pages[1:], num_ids)
        self._by_hash = BlockHashToBlockMap(num_ids)
        self.num_evictions = 0
        self._track_dead = track_dead
        self._dead: list[PageIds] = []
        self._load_kernels()

    def _load_kernels(self) -> None:
        """Makes every operation once, on no block: compiling is not for a request to wait for."""
        nothing = self._pages[:0]
        self.find_cached_prefix([], 0)
        self.touch(nothing)
        self.cache_blocks(nothing, [])
        self.free_blocks(self.get_new_blocks(0))

    def page_ids(self) -> PageIds:
        """Pages of the tenant, int64, ascending."""
        return self._pages

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, reusable ones among them."""
        return self._free.num_free_blocks

    @property
    def num_held_blocks(self) -> int:
        """Blocks that running requests hold."""
        return len(self._pages) - 1 - self._free.num_free_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, 0..1."""
        return self.num_held_blocks / max(1, len(self._pages) - 1)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content can be reused."""
        return len(self._by_hash)

    def free_block_ids(self) -> PageIds:
        """Free blocks in the order in which they will be handed out, int64."""
        return self._free.get_all_free_blocks()

    def find_cached_prefix(self, hashes: Sequence[BlockHash], max_blocks: int) -> PageIds:
        """Blocks with the content of the leading hashes, up to the first that is not there.

        Several blocks may hold the same content; the first cached one wins.
        """
        return self._by_hash.find_prefix(hashes[:max_blocks])

    def num_idle(self, block_ids: PageIds) -> int:
        """How many of some distinct blocks nobody reads: they are in the free list."""
        return int(np.count_nonzero(self.ref_cnt[block_ids] == 0))

    def get_new_blocks(self, num_blocks: int) -> PageIds:
        """Takes blocks from the front of the free list; what they held is gone.

        Raises:
            ValueError: not enough are free.
        """
        block_ids = self._free.popleft_n(num_blocks)
        self.ref_cnt[block_ids] = 1
        self.num_evictions += self._forget_content(block_ids)
        return block_ids

    def touch(self, block_ids: PageIds) -> None:
        """Adds a reader to cached blocks; a free one leaves the free list.

        Raises:
            IntegrityError: a page is not the tenant's.
        """
        bad, idle = _add_readers(self.ref_cnt, self.null_block, _contiguous(block_ids))
        if bad != _NONE_BAD:
            raise IntegrityError(f"block {block_ids[bad]} is not the KV tenant's")
        self._free.remove(idle)

    def free_blocks(self, ordered_block_ids: PageIds) -> None:
        """Takes a reader away; the first block without readers is the first to be evicted.

        Blocks without reusable content go to the front of the free list, the others to its tail.

        Raises:
            IntegrityError: a block is not held that often.
        """
        bad, dead, reusable = _drop_readers(
            self.ref_cnt, self.null_block, self._by_hash.has_hash, _contiguous(ordered_block_ids)
        )
        if bad != _NONE_BAD:
            raise IntegrityError(f"block {ordered_block_ids[bad]} was freed without being held")
        self._bury(dead)
        self._free.prepend_n(dead)
        self._free.append_n(reusable)

    def cache_blocks(self, block_ids: PageIds, hashes: Sequence[BlockHash]) -> None:
        """Makes the content of full blocks reusable; a hash for each.

        Raises:
            IntegrityError: a block has a hash already, comes twice, or is not held.
        """
        is_refused = (block_ids <= self.null_block) | (block_ids >= len(self.ref_cnt))
        if not is_refused.any():
            is_refused = self.ref_cnt[block_ids] < 1
        for block in block_ids[is_refused][:1]:
            raise IntegrityError(f"block {block} cannot take a hash")
        self._by_hash.insert(_contiguous(block_ids), hashes)

    def evict_blocks(self, block_ids: PageIds) -> int:
        """Makes blocks no longer reusable, also held ones; returns how many were.

        Whoever holds one goes on reading it; it leaves the pool's reach when it is freed.
        """
        forgotten = self._by_hash.pop(_contiguous(block_ids))
        self._bury(forgotten[self.ref_cnt[forgotten] == 0])
        return len(forgotten)

    def reset_prefix_cache(self) -> bool:
        """Forgets all reusable content; False, and nothing done, while blocks are held."""
        if self.num_held_blocks:
            return False
        self._forget_content(self._pages)
        return True

    def take_dead_blocks(self) -> list[int]:
        """Drains the pages whose content died since the last call (for poisoning them)."""
        if not self._dead:
            return []
        dead: list[int] = np.unique(np.concatenate(self._dead)).tolist()
        self._dead.clear()
        return dead

    def _forget_content(self, block_ids: PageIds) -> int:
        """Makes blocks no longer reusable; returns how many were."""
        forgotten = self._by_hash.pop(block_ids)
        self._bury(forgotten)
        return len(forgotten)

    def _bury(self, block_ids: PageIds) -> None:
        if self._track_dead and len(block_ids):
            self._dead.append(block_ids)

    def check_integrity(self) -> None:
        """Free + held + null = all blocks, and the hash index matches the blocks.

        Raises:
            IntegrityError: names the block.
        """
        is_free = self._free.check_integrity()
        has_no_reader = self.ref_cnt == 0
        has_no_reader[self.null_block] = False
        for block in np.flatnonzero(is_free != has_no_reader)[:1]:
            raise IntegrityError(
                f"KV: block {block} has {self.ref_cnt[block]} readers, free: {is_free[block]}"
            )
        self._by_hash.check_integrity()


def _contiguous(block_ids: PageIds) -> PageIds:
    """The one layout that kernels are compiled for."""
    return np.ascontiguousarray(block_ids, dtype=np.int64)


@njit(cache=True, nogil=True)
def _add_readers(ref_cnt: Any, null_block: Any, block_ids: Any) -> Any:
    """Counts a reader of each block.

    Returns:
        The place of an id that is no block, then nothing is counted, or _NONE_BAD; and the blocks
        that had no reader.
    """
    idle = np.empty(len(block_ids), dtype=np.int64)
    num_idle = 0
    for i in range(len(block_ids)):
        if not 0 <= block_ids[i] < len(ref_cnt) or ref_cnt[block_ids[i]] < 0:
            return i, idle[:0]
    for block in block_ids:
        if ref_cnt[block] == 0 and block != null_block:
            idle[num_idle] = block
            num_idle += 1
        ref_cnt[block] += 1
    return _NONE_BAD, idle[:num_idle]


@njit(cache=True, nogil=True)
def _drop_readers(ref_cnt: Any, null_block: Any, has_hash: Any, block_ids: Any) -> Any:
    """Counts a reader of each block less.

    Returns:
        The place of an id that is not held, then nothing is counted, or _NONE_BAD; and the blocks
        that have no reader any more, in the given order: those without a hash, those with one.
    """
    dead, reusable = np.empty_like(block_ids), np.empty_like(block_ids)
    num_dead = num_reusable = 0
    for i in range(len(block_ids)):
        block = block_ids[i]
        if not null_block < block < len(ref_cnt) or ref_cnt[block] < 1:
            for counted in block_ids[:i]:
                ref_cnt[counted] += 1
            return i, dead[:0], reusable[:0]
        ref_cnt[block] -= 1
        if ref_cnt[block] == 0 and has_hash[block]:
            reusable[num_reusable] = block
            num_reusable += 1
        elif ref_cnt[block] == 0:
            dead[num_dead] = block
            num_dead += 1
    return _NONE_BAD, dead[:num_dead], reusable[:num_reusable]

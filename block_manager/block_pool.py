"""The KV tenant's pages: reference counts, reusable content by hash, lazy eviction in LRU order.

Semantics follow vLLM 0.32's `BlockPool` (v1/core/block_pool.py). A block is *used* while requests
refer to it; otherwise it is in the free list, and if it carries a hash its content stays
reusable until the block is handed out again. A block's id is its page; all operations take and
return arrays of ids, int64 [n], and an operation that raises has changed nothing. With vLLM's
objects and signatures the same books are in `vllm_block_pool.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from block_manager import kv_kernels
from block_manager.block_hash import BlockHash
from block_manager.block_hash_map import BLOCK_HASHES, BlockHashToBlockMap, KeyFormat, KeyWords
from block_manager.exceptions import IntegrityError
from block_manager.free_queue import FreeKVCacheBlockQueue
from block_manager.kv_event_log import ClearedBlocks, KvEventLog, RemovedBlocks
from block_manager.kv_kernels import NO_ROOM, NONE_BAD, OWN_KEY
from block_manager.page_pool import PageIds

_NOT_OURS = -1


class BlockPool:
    """Owns the blocks of the KV tenant. The first page is the null block and never handed out."""

    def __init__(
        self,
        page_ids: PageIds,
        num_pages: int | None = None,
        track_dead: bool = False,
        *,
        key_format: KeyFormat = BLOCK_HASHES,
        enable_caching: bool = True,
    ) -> None:
        """Takes the KV tenant's pages; all but the null block start free.

        Args:
            page_ids: int64 [n], ascending.
            num_pages: every page that ever comes is below it; by default none comes.
            track_dead: pages whose content died are remembered until they are drained.
            key_format: what content is called by.
            enable_caching: without it, freed blocks are the next to be handed out, hash or not.
        """
        self.null_block = int(page_ids[0])
        """Id of the null block."""
        num_ids = int(page_ids[-1]) + 1 if num_pages is None else num_pages
        self.ref_cnt = np.full(num_ids, _NOT_OURS, dtype=np.int32)
        """Running requests that read or write each block, by block id; below 0 where the page is
        not the tenant's."""
        self.ref_cnt[page_ids] = 0
        self._num_pages = len(page_ids)
        self._free = FreeKVCacheBlockQueue(_contiguous(page_ids[1:]), num_ids)
        self._by_hash = BlockHashToBlockMap(num_ids, key_format)
        self._enable_caching = enable_caching
        self.num_evictions = 0
        self.event_log: KvEventLog | None = None
        """Where it is noted what becomes reusable and what goes; None = nobody listens."""
        self._track_dead = track_dead
        self._dead: list[PageIds] = []
        self._load_kernels()

    def _load_kernels(self) -> None:
        """Makes every operation once, on no block: compiling is not for a request to wait for."""
        nothing = np.empty(0, dtype=np.int64)
        self.find_cached_prefix([], 0)
        self.touch(nothing)
        self.cache_blocks(nothing, [])
        self.get_new_blocks(0)
        self.allocate([], 0)
        self.free_blocks(nothing)

    @property
    def free_block_queue(self) -> FreeKVCacheBlockQueue:
        """The free list."""
        return self._free

    @property
    def cached_block_hash_to_block(self) -> BlockHashToBlockMap:
        """Which blocks hold which content."""
        return self._by_hash

    def page_ids(self) -> PageIds:
        """Pages of the tenant, int64, ascending."""
        return np.flatnonzero(self.ref_cnt != _NOT_OURS)

    @property
    def num_pages(self) -> int:
        """Pages of the tenant, the null block among them."""
        return self._num_pages

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, reusable ones among them."""
        return self._free.num_free_blocks

    @property
    def num_held_blocks(self) -> int:
        """Blocks that running requests hold."""
        return self._num_pages - 1 - self._free.num_free_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, 0..1."""
        return self.num_held_blocks / max(1, self._num_pages - 1)

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

    def allocate(self, hashes: Sequence[BlockHash], num_blocks: int) -> tuple[PageIds, int] | None:
        """Finds a history's cached prefix, touches it and takes new blocks for the rest, at once.

        Args:
            hashes: of the blocks that may be reused, `num_blocks` at most.
            num_blocks: blocks of the whole history.

        Returns:
            The blocks, cached ones first, and how many were cached; None when there is no room and
            nothing was taken.
        """
        block_ids = np.empty(num_blocks, dtype=np.int64)
        forgotten = np.empty(num_blocks, dtype=np.int64)
        num_cached, num_left, num_forgotten = kv_kernels.allocate(
            self.ref_cnt,
            self._free.links,
            self._by_hash.table,
            self._free.num_free_blocks,
            self._by_hash.words(hashes),
            block_ids,
            forgotten,
        )
        if num_cached == NO_ROOM:
            return None
        self._free.num_free_blocks -= num_left
        self._by_hash.num_blocks -= num_forgotten
        self.num_evictions += num_forgotten
        self._report_removed(forgotten[:num_forgotten])
        self._bury(forgotten[:num_forgotten])
        return block_ids, num_cached

    def get_new_blocks(self, num_blocks: int) -> PageIds:
        """Takes blocks from the front of the free list; what they held is gone.

        Raises:
            ValueError: not enough are free.
        """
        block_ids = self._free.popleft_n(num_blocks)
        self.ref_cnt[block_ids] = 1
        if self._enable_caching:
            self.num_evictions += self._forget_content(block_ids)
        return block_ids

    def touch(self, block_ids: PageIds) -> None:
        """Adds a reader to cached blocks; a free one leaves the free list.

        Raises:
            IntegrityError: a page is not the tenant's.
        """
        bad, idle = kv_kernels.add_readers(self.ref_cnt, self.null_block, _contiguous(block_ids))
        if bad != NONE_BAD:
            raise IntegrityError(f"block {block_ids[bad]} is not the KV tenant's")
        self._free.remove(idle)

    def free_blocks(self, ordered_block_ids: PageIds, keep_all: bool = False) -> None:
        """Takes a reader away; the first block without readers is the first to be evicted.

        Blocks without reusable content go to the front of the free list, the others to its tail;
        with `keep_all` all go to its tail, where they may be read until they are handed out.

        Raises:
            IntegrityError: a block is not held that often.
        """
        worth_keeping = self._by_hash.key_kinds
        if keep_all or not self._enable_caching:
            worth_keeping = np.full(len(self.ref_cnt), OWN_KEY if keep_all else 0, dtype=np.uint8)
        bad, num_dead, num_reusable = kv_kernels.release(
            self.ref_cnt,
            self._free.links,
            worth_keeping,
            self.null_block,
            _contiguous(ordered_block_ids),
        )
        if bad != NONE_BAD:
            raise IntegrityError(f"block {ordered_block_ids[bad]} was freed without being held")
        self._free.num_free_blocks += num_dead + num_reusable
        if self._track_dead:
            self._bury(self._free.first_n(num_dead))

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
        self._report_removed(forgotten)
        self._bury(forgotten[self.ref_cnt[forgotten] == 0])
        return len(forgotten)

    def reset_prefix_cache(self) -> bool:
        """Forgets all reusable content; False, and nothing done, while blocks are held."""
        if self.num_held_blocks:
            return False
        self._bury(self._by_hash.pop(self.page_ids()))
        if self.event_log is not None:
            self.event_log.add(ClearedBlocks())
        return True

    def cached_hashes(self) -> KeyWords:
        """Hashes of all blocks whose content can be reused, one for each: int64 [n, words]."""
        return self._by_hash.hashes_of(np.flatnonzero(self._by_hash.key_kinds))

    def grow(self, page_ids: PageIds) -> None:
        """Takes pages (int64 [n]) that are not the tenant's; they are the first to be handed out.

        Raises:
            IntegrityError: a page is the tenant's already.
        """
        page_ids = _contiguous(page_ids)
        for page in page_ids[self.ref_cnt[page_ids] != _NOT_OURS][:1]:
            raise IntegrityError(f"block {page} came twice")
        self.ref_cnt[page_ids] = 0
        self._num_pages += len(page_ids)
        self._free.prepend_n(page_ids)
        self._bury(page_ids)

    def shrink(self, limit: int) -> PageIds:
        """Gives up to `limit` free blocks away, those first that would be evicted first: int64 [n].

        Blocks that requests hold stay until they are freed.
        """
        page_ids = self._free.popleft_n(max(0, min(limit, self.num_free_blocks)))
        self.num_evictions += self._forget_content(page_ids)
        self.ref_cnt[page_ids] = _NOT_OURS
        self._num_pages -= len(page_ids)
        return page_ids

    def take_dead_blocks(self) -> list[int]:
        """Drains the pages whose content died since the last call (for poisoning them).

        Pages that have left are not among them: rows may have been moved there by now.
        """
        if not self._dead:
            return []
        dead = np.unique(np.concatenate(self._dead))
        self._dead.clear()
        is_ours = self.ref_cnt[dead] != _NOT_OURS
        ours: list[int] = np.compress(is_ours, dead).tolist()
        return ours

    def _forget_content(self, block_ids: PageIds) -> int:
        """Makes blocks no longer reusable; returns how many were."""
        forgotten = self._by_hash.pop(block_ids)
        self._report_removed(forgotten)
        self._bury(forgotten)
        return len(forgotten)

    def _report_removed(self, block_ids: PageIds) -> None:
        if self.event_log is not None and len(block_ids):
            self.event_log.add(RemovedBlocks(self._by_hash.hashes_of(block_ids)))

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
        if int(np.count_nonzero(self.ref_cnt != _NOT_OURS)) != self._num_pages:
            raise IntegrityError("KV: the pages are miscounted")
        for block in np.flatnonzero(is_free != has_no_reader)[:1]:
            raise IntegrityError(
                f"KV: block {block} has {self.ref_cnt[block]} readers, free: {is_free[block]}"
            )
        self._by_hash.check_integrity()


def _contiguous(block_ids: PageIds) -> PageIds:
    """The one layout that kernels are compiled for."""
    return np.ascontiguousarray(block_ids, dtype=np.int64)

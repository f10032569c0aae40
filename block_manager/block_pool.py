"""The KV tenant's pages: reference counts, reusable content by hash, lazy eviction in LRU order.

Semantics follow vLLM 0.32's `BlockPool` (v1/core/block_pool.py). A block is *used* while requests
refer to it; otherwise it is in the free list, and if it carries a hash its content stays
reusable until the block is handed out again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from block_manager.block import KVCacheBlock
from block_manager.block_hash import BlockHash
from block_manager.exceptions import IntegrityError
from block_manager.free_queue import FreeKVCacheBlockQueue
from block_manager.page_pool import PageIds


class BlockPool:
    """Owns the blocks of the KV tenant. The first page is the null block and never handed out."""

    def __init__(self, page_ids: PageIds, track_dead: bool = False) -> None:
        """Takes the KV tenant's pages, ascending; all but the null block start free.

        With `track_dead`, pages whose content died are remembered until they are drained.
        """
        self.blocks = {int(page): KVCacheBlock(int(page)) for page in page_ids}
        self.null_block = self.blocks[int(page_ids[0])]
        self.null_block.is_null = True
        self._free = FreeKVCacheBlockQueue(
            [block for block in self.blocks.values() if not block.is_null]
        )
        self._by_hash: dict[BlockHash, dict[int, KVCacheBlock]] = {}
        self.num_evictions = 0
        self._track_dead = track_dead
        self._dead: set[int] = set()

    def page_ids(self) -> PageIds:
        """Pages of the tenant, int64, ascending."""
        return np.fromiter(self.blocks, dtype=np.int64, count=len(self.blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, reusable ones among them."""
        return self._free.num_free_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, 0..1."""
        return 1.0 - self._free.num_free_blocks / max(1, len(self.blocks) - 1)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content can be reused."""
        return sum(map(len, self._by_hash.values()))

    def get_cached_block(self, block_hash: BlockHash) -> KVCacheBlock | None:
        """A block with this content, or None. Several may hold it; the first cached one wins."""
        copies = self._by_hash.get(block_hash)
        return next(iter(copies.values())) if copies else None

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Takes blocks from the front of the free list; what they held is gone.

        Raises:
            ValueError: not enough are free; nothing is taken.
        """
        blocks = self._free.popleft_n(num_blocks)
        for block in blocks:
            self.num_evictions += block.block_hash is not None
            self._forget_content(block)
            block.ref_cnt = 1
        return blocks

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Adds a reader to cached blocks; a free one leaves the free list."""
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self._free.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        """Takes a reader away; the first block without readers is the first to be evicted.

        Blocks without reusable content go to the front of the free list, the others to its tail.

        Raises:
            IntegrityError: a block is not held that often; nothing is changed.
        """
        for block, times in Counter(ordered_blocks).items():
            if block.ref_cnt < times or block.is_null:
                raise IntegrityError(f"block {block.block_id} was freed without being held")
        freed = []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        dead = [block for block in freed if block.block_hash is None]
        if self._track_dead:
            self._dead.update(block.block_id for block in dead)
        self._free.prepend_n(dead)
        self._free.append_n([block for block in freed if block.block_hash is not None])

    def cache_block(self, block: KVCacheBlock, block_hash: BlockHash) -> None:
        """Makes a full block's content reusable."""
        if block.block_hash is not None or block.is_null or block.ref_cnt < 1:
            raise IntegrityError(f"block {block.block_id} cannot take a hash")
        block.block_hash = block_hash
        self._by_hash.setdefault(block_hash, {})[block.block_id] = block

    def reset_prefix_cache(self) -> bool:
        """Forgets all reusable content; False, and nothing done, while blocks are held."""
        if self._free.num_free_blocks != len(self.blocks) - 1:
            return False
        for block in self.blocks.values():
            self._forget_content(block)
        return True

    def take_dead_blocks(self) -> list[int]:
        """Drains the pages whose content died since the last call (for poisoning them)."""
        dead = sorted(self._dead)
        self._dead.clear()
        return dead

    def _forget_content(self, block: KVCacheBlock) -> None:
        if block.block_hash is None:
            return
        copies = self._by_hash[block.block_hash]
        del copies[block.block_id]
        if not copies:
            del self._by_hash[block.block_hash]
        block.block_hash = None
        if self._track_dead:
            self._dead.add(block.block_id)

    def check_integrity(self) -> None:
        """Free + held + null = all blocks, and the hash index matches the blocks.

        Raises:
            IntegrityError: names the block.
        """
        free = list(self._free)
        free_ids = {block.block_id for block in free}
        if len(free) != len(free_ids) or len(free) != self._free.num_free_blocks:
            raise IntegrityError("KV: the free list holds a block twice or miscounts")
        for block in self.blocks.values():
            is_free = block.block_id in free_ids
            if not block.is_null and is_free != (block.ref_cnt == 0):
                raise IntegrityError(
                    f"KV: block {block.block_id} has {block.ref_cnt} readers, free: {is_free}"
                )
            if block.block_hash is not None and block.block_id not in self._by_hash.get(
                block.block_hash, {}
            ):
                raise IntegrityError(f"KV: block {block.block_id} is missing from the hash index")
        hashed = sum(block.block_hash is not None for block in self.blocks.values())
        if hashed != self.num_cached_blocks:
            raise IntegrityError("KV: the hash index holds blocks that carry no hash")

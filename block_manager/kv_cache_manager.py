"""Block tables of running requests: prefix lookup, allocation, caching, freeing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from block_manager.block import KVCacheBlock
from block_manager.block_hash import BlockHash
from block_manager.block_pool import BlockPool
from block_manager.exceptions import IntegrityError


class KVCacheManager:
    """Hands blocks of the pool to requests, whole histories at a time.

    A request gets the blocks of its entire history when it is admitted, so that it can always
    finish: nothing running is ever preempted for memory.
    """

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self._held: dict[str, list[KVCacheBlock]] = {}
        self._num_cached: dict[str, int] = {}

    def allocate(
        self, request_id: str, hashes: Sequence[BlockHash], num_tokens: int, max_cached_tokens: int
    ) -> int | None:
        """Gives a request the blocks of its history, cached ones first.

        Args:
            request_id: must hold nothing yet.
            hashes: of the history's full blocks whose K and V are final; empty = no reuse.
            num_tokens: rows of the history.
            max_cached_tokens: rows that may be reused (rows beyond must be computed).

        Returns:
            Tokens found in the cache, or None when there is no room and nothing was taken.
        """
        if request_id in self._held:
            raise IntegrityError(f"request {request_id} already holds blocks")
        cached = self._cached_prefix(hashes, max_cached_tokens)
        num_new = -(-num_tokens // self.block_tokens) - len(cached)
        # Cached blocks that nobody reads are in the free list too and are about to leave it.
        num_idle = sum(block.ref_cnt == 0 for block in cached)
        if num_new > self.pool.num_free_blocks - num_idle:
            return None
        self.pool.touch(cached)
        self._held[request_id] = cached + self.pool.get_new_blocks(num_new)
        self._num_cached[request_id] = len(cached)
        return len(cached) * self.block_tokens

    def _cached_prefix(self, hashes: Sequence[BlockHash], max_tokens: int) -> list[KVCacheBlock]:
        found = []
        for block_hash in hashes[: max_tokens // self.block_tokens]:
            block = self.pool.get_cached_block(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def block_table(self, request_id: str) -> npt.NDArray[np.int64]:
        """Pages of a request's history, int64 [blocks], oldest first."""
        blocks = self._held[request_id]
        return np.fromiter((block.block_id for block in blocks), np.int64, len(blocks))

    def cache_blocks(self, request_id: str, hashes: Sequence[BlockHash], num_computed: int) -> None:
        """Makes those full blocks reusable whose rows have all been computed.

        Args:
            request_id: whose blocks.
            hashes: of the full blocks whose K and V are final.
            num_computed: rows computed so far.
        """
        blocks = self._held[request_id]
        first = self._num_cached[request_id]
        last = min(num_computed // self.block_tokens, len(hashes))
        for index in range(first, last):
            self.pool.cache_block(blocks[index], hashes[index])
        self._num_cached[request_id] = max(first, last)

    def free(self, request_id: str) -> None:
        """Lets go of a request's blocks, if it holds any; the tail is evicted first."""
        blocks = self._held.pop(request_id, None)
        if blocks is not None:
            del self._num_cached[request_id]
            self.pool.free_blocks(blocks[::-1])

    def check_integrity(self) -> None:
        """Reference counts equal the running users.

        Raises:
            IntegrityError: names the block.
        """
        readers: dict[int, int] = {}
        for blocks in self._held.values():
            for block in blocks:
                readers[block.block_id] = readers.get(block.block_id, 0) + 1
        for block in self.pool.blocks.values():
            if not block.is_null and block.ref_cnt != readers.get(block.block_id, 0):
                raise IntegrityError(
                    f"KV: block {block.block_id} counts {block.ref_cnt} readers, "
                    f"requests hold it {readers.get(block.block_id, 0)} times"
                )

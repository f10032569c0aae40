"""Block tables of running requests: prefix lookup, allocation, caching, freeing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from block_manager.block_hash import NO_USER_TAG, BlockHash
from block_manager.block_pool import BlockPool
from block_manager.exceptions import IntegrityError
from block_manager.kv_event_log import HashedTokens, StoredBlocks
from block_manager.page_pool import PageIds


class KVCacheManager:
    """Hands blocks of the pool to requests, whole histories at a time.

    A request gets the blocks of its entire history when it is admitted, so that it can always
    finish: nothing running is ever preempted for memory.
    """

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self._held: dict[str, PageIds] = {}
        self._num_cached: dict[str, int] = {}
        self._user_of_block = np.full(len(pool.ref_cnt), NO_USER_TAG, dtype=np.int64)
        """Whose KV a block was when it last became reusable."""

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
        reusable = hashes[: max_cached_tokens // self.block_tokens]
        allocated = self.pool.allocate(reusable, -(-num_tokens // self.block_tokens))
        if allocated is None:
            return None
        self._held[request_id], num_cached = allocated
        self._num_cached[request_id] = num_cached
        return num_cached * self.block_tokens

    def block_table(self, request_id: str) -> PageIds:
        """Pages of a request's history, int64 [blocks], oldest first; not to be written to."""
        return self._held[request_id]

    def cache_blocks(
        self,
        request_id: str,
        hashes: Sequence[BlockHash],
        num_computed: int,
        user_tag: int,
        tokens: HashedTokens | None = None,
    ) -> None:
        """Makes those full blocks reusable whose rows have all been computed.

        Args:
            request_id: whose blocks.
            hashes: of the full blocks whose K and V are final.
            num_computed: rows computed so far.
            user_tag: whose KV it is.
            tokens: of the history, for those who listen to the pool's events; None = not told.
        """
        first = self._num_cached[request_id]
        last = min(num_computed // self.block_tokens, len(hashes))
        if last > first:
            blocks = self._held[request_id][first:last]
            self.pool.cache_blocks(blocks, hashes[first:last])
            self._user_of_block[blocks] = user_tag
            self._num_cached[request_id] = last
            if self.pool.event_log is not None:
                self.pool.event_log.add(
                    StoredBlocks(
                        hashes=hashes[first:last],
                        parent=hashes[first - 1] if first else None,
                        first_token=first * self.block_tokens,
                        tokens=tokens,
                        user_tag=user_tag,
                    )
                )

    def forget_user(self, user_tag: int) -> int:
        """Makes a user's blocks no longer reusable; returns how many were.

        Raises:
            ValueError: the tag is no user's.
        """
        if user_tag == NO_USER_TAG:
            raise ValueError("user_tag: blocks without a user cannot be forgotten")
        return self.pool.evict_blocks(np.flatnonzero(self._user_of_block == user_tag))

    def free(self, *request_ids: str) -> None:
        """Lets go of the blocks of requests, of those that hold any; each one's tail goes first."""
        held = [self._held.pop(one)[::-1] for one in request_ids if one in self._held]
        if held:
            for request_id in request_ids:
                self._num_cached.pop(request_id, None)
            self.pool.free_blocks(np.concatenate(held))

    def check_integrity(self) -> None:
        """Reference counts equal the running users.

        Raises:
            IntegrityError: names the block.
        """
        pages = self.pool.page_ids()[1:]  # The null block is no request's.
        held = np.concatenate([*self._held.values(), pages[:0]])
        readers = np.bincount(held, minlength=len(self.pool.ref_cnt))[pages]
        counted = self.pool.ref_cnt[pages]
        for place in np.flatnonzero(counted != readers)[:1]:
            raise IntegrityError(
                f"KV: block {pages[place]} counts {counted[place]} readers, "
                f"requests hold it {readers[place]} times"
            )

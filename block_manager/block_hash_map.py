"""Which KV blocks hold which content: a hash table over arrays, looked up a prefix at a time.

A dict of 600,000 hashes is spread over so much memory that most lookups wait for it, one after
another; here a lookup reads two places, and those of one prefix overlap. Blocks of one bucket are
chained in the order in which they were cached, so of several with the same content the first one
is met first. The name is that of vLLM's map (v1/core/block_pool.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from block_manager import kv_kernels
from block_manager.block_hash import BLOCK_HASH_BYTES, BlockHash
from block_manager.exceptions import IntegrityError
from block_manager.kv_kernels import NO_BLOCK, NONE_BAD, HashTable
from block_manager.page_pool import PageIds

_WORDS = BLOCK_HASH_BYTES // 8


class BlockHashToBlockMap:
    """Hashes of blocks, and blocks of hashes. Several blocks may carry the same hash."""

    def __init__(self, num_ids: int) -> None:
        """Every block id that ever comes is below `num_ids`."""
        self.has_hash = np.zeros(num_ids, dtype=np.bool_)
        """Which blocks carry a hash, by block id."""
        self._hashes = np.zeros((num_ids, _WORDS), dtype=np.int64)
        # A power of two, and one bucket per block at least. Hashes are cryptographic and cover a
        # secret, so nobody can aim at a bucket.
        self._first = np.full(1 << num_ids.bit_length(), NO_BLOCK, dtype=np.int32)
        self._next = np.full(num_ids, NO_BLOCK, dtype=np.int32)
        self.table = HashTable(self._first, self._next, self._hashes, self.has_hash)
        """What kernels work on; whoever lets one do so counts `num_blocks` too."""
        self.num_blocks = 0

    def __len__(self) -> int:
        """Blocks that carry a hash."""
        return self.num_blocks

    def find_prefix(self, hashes: Sequence[BlockHash]) -> PageIds:
        """Blocks that hold the leading hashes, up to the first that none holds: int64 [n]."""
        found: PageIds = kv_kernels.find_prefix(self.table, hash_words(hashes))
        return found

    def insert(self, block_ids: PageIds, hashes: Sequence[BlockHash]) -> None:
        """Gives each block (int64 [n]) a hash.

        Raises:
            IntegrityError: a block has a hash already, or comes twice; none is given.
        """
        words = hash_words(hashes)
        if len(words) != len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks cannot take {len(words)} hashes")
        bad = kv_kernels.insert(self.table, block_ids, words)
        if bad != NONE_BAD:
            raise IntegrityError(f"block {block_ids[bad]} cannot take a hash")
        self.num_blocks += len(block_ids)

    def pop(self, block_ids: PageIds) -> PageIds:
        """Takes the hashes from distinct blocks (int64 [n]); returns those that had one."""
        popped: PageIds = kv_kernels.remove(self.table, block_ids)
        self.num_blocks -= len(popped)
        return popped

    def check_integrity(self) -> None:
        """Lookup can reach all blocks that carry a hash, and no others.

        Raises:
            IntegrityError: names the block.
        """
        is_reached = kv_kernels.reached(self.table)
        for block in np.flatnonzero(self.has_hash & ~is_reached)[:1]:
            raise IntegrityError(f"KV: block {block} is missing from the hash index")
        for block in np.flatnonzero(is_reached & ~self.has_hash)[:1]:
            raise IntegrityError(f"KV: the hash index holds block {block}, which carries no hash")
        if np.count_nonzero(self.has_hash) != self.num_blocks:
            raise IntegrityError("KV: blocks with a hash are miscounted")


def hash_words(hashes: Sequence[BlockHash]) -> npt.NDArray[np.int64]:
    """Hashes as int64 [n, words]."""
    joined = b"".join(hashes)
    if len(joined) != BLOCK_HASH_BYTES * len(hashes):
        raise ValueError(f"a block's hash must have {BLOCK_HASH_BYTES} bytes")
    return np.frombuffer(joined, dtype=np.int64).reshape(-1, _WORDS)

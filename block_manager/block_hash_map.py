"""Which KV blocks hold which content: a hash table over arrays, looked up a prefix at a time.

A dict of 600,000 hashes is spread over so much memory that most lookups wait for it, one after
another; here a lookup reads two places, and those of one prefix overlap. Blocks of one bucket are
chained in the order in which they were cached, so of several with the same content the first one
is met first. The name is that of vLLM's map (v1/core/block_pool.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.block_hash import BLOCK_HASH_BYTES, BlockHash
from block_manager.exceptions import IntegrityError
from block_manager.page_pool import PageIds

_NO_BLOCK = -1
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
        self._first = np.full(1 << num_ids.bit_length(), _NO_BLOCK, dtype=np.int32)
        self._next = np.full(num_ids, _NO_BLOCK, dtype=np.int32)
        self._num_blocks = 0

    def __len__(self) -> int:
        """Blocks that carry a hash."""
        return self._num_blocks

    def find_prefix(self, hashes: Sequence[BlockHash]) -> PageIds:
        """Blocks that hold the leading hashes, up to the first that none holds: int64 [n]."""
        found: PageIds = _find_prefix(self._first, self._next, self._hashes, _words(hashes))
        return found

    def insert(self, block_ids: PageIds, hashes: Sequence[BlockHash]) -> None:
        """Gives each block (int64 [n]) a hash.

        Raises:
            IntegrityError: a block has a hash already, or comes twice; none is given.
        """
        words = _words(hashes)
        if len(words) != len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks cannot take {len(words)} hashes")
        num_marked = _mark(self.has_hash, block_ids)
        if num_marked != len(block_ids):
            raise IntegrityError(f"block {block_ids[num_marked]} cannot take a hash")
        _insert(self._first, self._next, self._hashes, block_ids, words)
        self._num_blocks += len(block_ids)

    def pop(self, block_ids: PageIds) -> PageIds:
        """Takes the hashes from distinct blocks (int64 [n]); returns those that had one."""
        popped: PageIds = block_ids[self.has_hash[block_ids]]
        _remove(self._first, self._next, self._hashes, popped)
        self.has_hash[popped] = False
        self._num_blocks -= len(popped)
        return popped

    def check_integrity(self) -> None:
        """Lookup can reach all blocks that carry a hash, and no others.

        Raises:
            IntegrityError: names the block.
        """
        is_reached = _reached(self._first, self._next, self._hashes)
        for block in np.flatnonzero(self.has_hash & ~is_reached)[:1]:
            raise IntegrityError(f"KV: block {block} is missing from the hash index")
        for block in np.flatnonzero(is_reached & ~self.has_hash)[:1]:
            raise IntegrityError(f"KV: the hash index holds block {block}, which carries no hash")
        if np.count_nonzero(self.has_hash) != self._num_blocks:
            raise IntegrityError("KV: blocks with a hash are miscounted")


def _words(hashes: Sequence[BlockHash]) -> npt.NDArray[np.int64]:
    """Hashes as int64 [n, words]."""
    joined = b"".join(hashes)
    if len(joined) != BLOCK_HASH_BYTES * len(hashes):
        raise ValueError(f"a block's hash must have {BLOCK_HASH_BYTES} bytes")
    return np.frombuffer(joined, dtype=np.int64).reshape(-1, _WORDS)


@njit(cache=True, nogil=True)
def _are_equal(one: Any, other: Any) -> Any:
    for word in range(_WORDS):  # noqa: SIM110
        if one[word] != other[word]:
            return False
    return True


@njit(cache=True, nogil=True)
def _find_prefix(first: Any, following: Any, hashes: Any, wanted: Any) -> Any:
    found = np.empty(len(wanted), dtype=np.int64)
    for i in range(len(wanted)):
        block = first[wanted[i, 0] & (len(first) - 1)]
        while block != _NO_BLOCK and not _are_equal(hashes[block], wanted[i]):
            block = following[block]
        if block == _NO_BLOCK:
            return found[:i]
        found[i] = block
    return found


@njit(cache=True, nogil=True)
def _mark(has_hash: Any, block_ids: Any) -> Any:
    """Marks blocks up to the first that is marked already, then none; how many come before it."""
    for i in range(len(block_ids)):
        if has_hash[block_ids[i]]:
            for marked in block_ids[:i]:
                has_hash[marked] = False
            return i
        has_hash[block_ids[i]] = True
    return len(block_ids)


@njit(cache=True, nogil=True)
def _insert(first: Any, following: Any, hashes: Any, block_ids: Any, words: Any) -> None:
    """Puts blocks at the end of their buckets' chains."""
    for i in range(len(block_ids)):
        block = block_ids[i]
        hashes[block] = words[i]
        following[block] = _NO_BLOCK
        bucket = words[i, 0] & (len(first) - 1)
        last = first[bucket]
        if last == _NO_BLOCK:
            first[bucket] = block
            continue
        while following[last] != _NO_BLOCK:
            last = following[last]
        following[last] = block


@njit(cache=True, nogil=True)
def _remove(first: Any, following: Any, hashes: Any, block_ids: Any) -> None:
    """Takes blocks out of their buckets' chains."""
    for block in block_ids:
        bucket = hashes[block, 0] & (len(first) - 1)
        before = first[bucket]
        if before == block:
            first[bucket] = following[block]
            continue
        while following[before] != block:
            before = following[before]
        following[before] = following[block]


@njit(cache=True, nogil=True)
def _reached(first: Any, following: Any, hashes: Any) -> Any:
    """Which blocks are in the chain of the bucket that their hash names."""
    is_reached = np.zeros(len(following), dtype=np.bool_)
    for bucket in range(len(first)):
        block = first[bucket]
        # A block that was met before closes a ring, and its second place is wrong.
        while block != _NO_BLOCK and not is_reached[block]:
            is_reached[block] = hashes[block, 0] & (len(first) - 1) == bucket
            block = following[block] if is_reached[block] else _NO_BLOCK
    return is_reached

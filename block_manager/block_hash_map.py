"""Which KV blocks hold which content: a hash table over arrays, looked up a prefix at a time.

A dict of 600,000 hashes is spread over so much memory that most lookups wait for it, one after
another; here a lookup reads two places, and those of one prefix overlap. Blocks of one bucket are
chained in the order in which they were cached, so of several with the same content the first one
is met first. The name is that of vLLM's map (v1/core/block_pool.py).

A block has one key of its own. Where blocks can be reused from their middle it may have more, each
an entry in the same chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from block_manager import kv_kernels
from block_manager.block_hash import BLOCK_HASH_BYTES
from block_manager.exceptions import IntegrityError
from block_manager.kv_kernels import (
    BLOCK,
    MORE_KEYS,
    NO_BLOCK,
    NONE_BAD,
    OF_BLOCK,
    OWN_KEY,
    HashTable,
)
from block_manager.page_pool import PageIds

KeyWords = npt.NDArray[np.int64]


class KeyFormat(NamedTuple):
    """What content is called by: bytes outside, words of 8 bytes in the table."""

    num_words: int
    words: Callable[[Sequence[bytes]], KeyWords]
    """Keys as int64 [n, num_words]; raises ValueError for a key that is none."""


def hash_words(hashes: Sequence[bytes]) -> KeyWords:
    """Hashes of blocks as int64 [n, words].

    Raises:
        ValueError: a hash has another length.
    """
    joined = b"".join(hashes)
    if len(joined) != BLOCK_HASH_BYTES * len(hashes):
        raise ValueError(f"a block's hash must have {BLOCK_HASH_BYTES} bytes")
    return np.frombuffer(joined, dtype=np.int64).reshape(-1, BLOCK_HASH_BYTES // 8)


BLOCK_HASHES = KeyFormat(BLOCK_HASH_BYTES // 8, hash_words)
"""The engine's own keys."""


class BlockHashToBlockMap:
    """Keys of blocks, and blocks of keys. Several blocks may carry the same key."""

    def __init__(self, num_ids: int, key_format: KeyFormat = BLOCK_HASHES) -> None:
        """Every block id that ever comes is below `num_ids`."""
        self.words = key_format.words
        self.key_kinds = np.zeros(num_ids, dtype=np.uint8)
        """Which kinds of key a block carries (OWN_KEY, MORE_KEYS), by block id."""
        self._hashes = np.zeros((num_ids, key_format.num_words), dtype=np.int64)
        # A power of two, and one bucket per block at least. Hashes are cryptographic and cover a
        # secret, so nobody can aim at a bucket.
        self._first = np.full(1 << num_ids.bit_length(), NO_BLOCK, dtype=np.int32)
        self._links = np.full((1, num_ids), NO_BLOCK, dtype=np.int32)
        self.table = HashTable(self._first, self._links, self._hashes, self.key_kinds)
        """What kernels work on; whoever lets one do so counts `num_blocks` too."""
        self.num_blocks = 0

    def __len__(self) -> int:
        """Blocks that carry a key."""
        return self.num_blocks

    def find_prefix(self, keys: Sequence[bytes]) -> PageIds:
        """Blocks that hold the leading keys, up to the first that none holds: int64 [n]."""
        found: PageIds = kv_kernels.find_prefix(self.table, self.words(keys))
        return found

    def insert(self, block_ids: PageIds, keys: Sequence[bytes]) -> None:
        """Gives each block (int64 [n]) its own key.

        Raises:
            IntegrityError: a block has one already, or comes twice; none is given.
        """
        words = self.words(keys)
        if len(words) != len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks cannot take {len(words)} hashes")
        bad, num_keyless = kv_kernels.insert(self.table, block_ids, words)
        if bad != NONE_BAD:
            raise IntegrityError(f"block {block_ids[bad]} cannot take a hash")
        self.num_blocks += num_keyless

    def pop(self, block_ids: PageIds) -> PageIds:
        """Takes all keys from distinct blocks (int64 [n]); returns those that had one."""
        popped: PageIds = kv_kernels.remove(self.table, block_ids)
        self.num_blocks -= len(popped)
        return popped

    def hashes_of(self, block_ids: PageIds) -> KeyWords:
        """Own keys of blocks (int64 [n]) that have one or had one last: int64 [n, words]."""
        words: KeyWords = self._hashes[block_ids]
        return words

    # ---------------------------------------------------------------- further keys

    def insert_extra(self, block: int, key: bytes) -> None:
        """Gives a block one more key."""
        words = self.words([key])
        if not self._has_extras or self._links[OF_BLOCK, len(self.key_kinds)] == NO_BLOCK:
            self._add_extras()
        self.num_blocks += not self.key_kinds[block]
        kv_kernels.insert_extra(self.table, block, words)

    @property
    def _has_extras(self) -> bool:
        return len(self._links) > 1

    def _add_extras(self) -> None:
        """Makes room for further keys, as many as there is room for already."""
        num_ids, old = len(self.key_kinds), len(self._hashes)
        if not self._has_extras:
            old += 1
        new = max(64, old - num_ids)
        links = np.full((3, old + new), NO_BLOCK, dtype=np.int32)
        links[: len(self._links), : self._links.shape[1]] = self._links
        links[OF_BLOCK, old:-1] = np.arange(old + 1, old + new)
        links[OF_BLOCK, num_ids] = old
        hashes = np.zeros((old + new, self._hashes.shape[1]), dtype=np.int64)
        hashes[: len(self._hashes)] = self._hashes
        self._links, self._hashes = links, hashes
        self.table = HashTable(self._first, self._links, self._hashes, self.key_kinds)

    def holders(self, key: bytes) -> list[int]:
        """All blocks that carry a key, in the order in which they got it."""
        return [self._block_of(entry) for entry in self._entries_of(key)]

    def pop_key(self, block: int, key: bytes) -> bool:
        """Takes one key from a block; whether the block had it."""
        for entry in self._entries_of(key):
            if self._block_of(entry) == block:
                kv_kernels.remove_entry(self.table, entry)
                self.num_blocks -= not self.key_kinds[block]
                return True
        return False

    def own_words(self, block: int) -> KeyWords | None:
        """A block's own key as int64 [words], or None."""
        return self._hashes[block] if self.key_kinds[block] & OWN_KEY else None

    def extra_words(self, block: int) -> list[KeyWords]:
        """A block's further keys as int64 [words], in the order in which they came."""
        found: list[KeyWords] = []
        if not self.key_kinds[block] & MORE_KEYS:
            return found
        entry = self._links[OF_BLOCK, block]
        while entry != NO_BLOCK:
            found.append(self._hashes[entry])
            entry = self._links[OF_BLOCK, entry]
        return found

    def _entries_of(self, key: bytes) -> list[int]:
        entries: list[int] = kv_kernels.entries_of(self.table, self.words([key])).tolist()
        return entries

    def _block_of(self, entry: int) -> int:
        return entry if entry < len(self.key_kinds) else int(self._links[BLOCK, entry])

    def check_integrity(self) -> None:
        """Lookup can reach all keys that blocks carry, and no others.

        Raises:
            IntegrityError: names the block.
        """
        num_ids = len(self.key_kinds)
        is_reached = kv_kernels.reached(self.table)
        is_own, is_extra = is_reached[:num_ids], is_reached[num_ids:]
        has_own = (self.key_kinds & OWN_KEY) > 0
        for block in np.flatnonzero(has_own & ~is_own)[:1]:
            raise IntegrityError(f"KV: block {block} is missing from the hash index")
        for block in np.flatnonzero(is_own & ~has_own)[:1]:
            raise IntegrityError(f"KV: the hash index holds block {block}, which carries no hash")
        owners = self._links[-1, num_ids:]
        if not np.array_equal(is_extra, owners != NO_BLOCK):
            raise IntegrityError("KV: the hash index and the blocks' further keys differ")
        has_more = (self.key_kinds & MORE_KEYS) > 0
        for block, known in zip(*np.unique(owners[is_extra], return_counts=True), strict=True):
            if not has_more[block] or len(self.extra_words(block)) != known:
                raise IntegrityError(f"KV: block {block} does not know all keys that it has")
        if np.count_nonzero(has_more) != len(np.unique(owners[is_extra])):
            raise IntegrityError("KV: a block has no further key and thinks that it has")
        if np.count_nonzero(self.key_kinds) != self.num_blocks:
            raise IntegrityError("KV: blocks with a hash are miscounted")

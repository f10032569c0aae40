"""Compiled operations on the books of KV blocks: reference counts, free list, hash table.

A request of thousands of tokens has hundreds of blocks, and after a step's attention the books are
in no cache of the processor: each operation is one pass over arrays. They are in one file because
numba's compiled copies on disk notice changes of their own file only.

Block ids are int64 [n]; the arrays are indexed by them and belong to `BlockPool`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Int32Array = npt.NDArray[np.int32]

NO_BLOCK = -1
UNLINKED = -1
NONE_BAD = -1
NO_ROOM = -1


class FreeList(NamedTuple):
    """A doubly linked list; its two sentinels are the last two places."""

    following: Int32Array
    """int32 [num_ids + 2], UNLINKED where a block is not in the list."""
    preceding: Int32Array
    """Likewise."""


class HashTable(NamedTuple):
    """Blocks by the hash of their content; those of a bucket are chained."""

    first: Int32Array
    """Of each bucket's chain, or NO_BLOCK, int32 [buckets], a power of two."""
    following: Int32Array
    """The next one in the chain, or NO_BLOCK, int32 [num_ids]."""
    hashes: npt.NDArray[np.int64]
    """int64 [num_ids, words]; the first word's lowest bits are the bucket."""
    has_hash: npt.NDArray[np.bool_]
    """bool [num_ids]."""


# ---------------------------------------------------------------- free list


@njit(cache=True, nogil=True)
def walk(free: Any, place: Any, n: Any) -> Any:
    """The n blocks after a place."""
    following = free.following
    block_ids = np.empty(n, dtype=np.int64)
    for i in range(n):
        place = following[place]
        block_ids[i] = place
    return block_ids


@njit(cache=True, nogil=True)
def link(free: Any, place: Any, block_ids: Any) -> None:
    """Puts blocks after a place, in the given order."""
    following, preceding = free.following, free.preceding
    after = following[place]
    for block in block_ids:
        following[place] = block
        preceding[block] = place
        place = block
    following[place] = after
    preceding[after] = place


@njit(cache=True, nogil=True)
def unlink(free: Any, block_ids: Any) -> Any:
    """Takes blocks out of the list, or none and returns the first that is not in it."""
    following, preceding = free.following, free.preceding
    for block in block_ids:
        if following[block] == UNLINKED:
            return block
    for block in block_ids:
        following[preceding[block]] = following[block]
        preceding[following[block]] = preceding[block]
        following[block] = preceding[block] = UNLINKED
    return UNLINKED


# ---------------------------------------------------------------- hash table


@njit(cache=True, nogil=True)
def _holds(hashes: Any, block: Any, wanted: Any, place: Any) -> Any:
    # Indexed by both at once: a row of its own would count a reference, and wait for memory.
    for word in range(hashes.shape[1]):  # noqa: SIM110
        if hashes[block, word] != wanted[place, word]:
            return False
    return True


@njit(cache=True, nogil=True)
def find_prefix(table: Any, wanted: Any) -> Any:
    """Blocks that hold the leading hashes (int64 [n, words]), up to the first that none holds."""
    first, following, hashes = table.first, table.following, table.hashes
    found = np.empty(len(wanted), dtype=np.int64)
    # All buckets first: these reads do not wait for one another.
    for i in range(len(wanted)):
        found[i] = first[wanted[i, 0] & (len(first) - 1)]
    for i in range(len(wanted)):
        block = found[i]
        while block != NO_BLOCK and not _holds(hashes, block, wanted, i):
            block = following[block]
        if block == NO_BLOCK:
            return found[:i]
        found[i] = block
    return found


@njit(cache=True, nogil=True)
def insert(table: Any, block_ids: Any, words: Any) -> Any:
    """Gives each block its hash and puts it at the end of its bucket's chain.

    Returns:
        The place of a block that carries a hash already or comes twice, then none is given one, or
        NONE_BAD.
    """
    first, following = table.first, table.following
    hashes, has_hash = table.hashes, table.has_hash
    for i in range(len(block_ids)):
        if has_hash[block_ids[i]]:
            for marked in block_ids[:i]:
                has_hash[marked] = False
            return i
        has_hash[block_ids[i]] = True
    for i in range(len(block_ids)):
        block = block_ids[i]
        hashes[block] = words[i]
        following[block] = NO_BLOCK
        bucket = words[i, 0] & (len(first) - 1)
        last = first[bucket]
        if last == NO_BLOCK:
            first[bucket] = block
            continue
        while following[last] != NO_BLOCK:
            last = following[last]
        following[last] = block
    return NONE_BAD


@njit(cache=True, nogil=True)
def remove(table: Any, block_ids: Any) -> Any:
    """Takes the hashes from distinct blocks and returns those that had one."""
    first, following = table.first, table.following
    hashes, has_hash = table.hashes, table.has_hash
    removed = np.empty(len(block_ids), dtype=np.int64)
    number = 0
    for block in block_ids:
        if not has_hash[block]:
            continue
        has_hash[block] = False
        removed[number] = block
        number += 1
        bucket = hashes[block, 0] & (len(first) - 1)
        before = first[bucket]
        if before == block:
            first[bucket] = following[block]
            continue
        while following[before] != block:
            before = following[before]
        following[before] = following[block]
    return removed[:number]


@njit(cache=True, nogil=True)
def reached(table: Any) -> Any:
    """Which blocks are in the chain of the bucket that their hash names: bool [num_ids]."""
    first, following, hashes = table.first, table.following, table.hashes
    is_reached = np.zeros(len(following), dtype=np.bool_)
    for bucket in range(len(first)):
        block = first[bucket]
        # A block that was met before closes a ring, and its second place is wrong.
        while block != NO_BLOCK and not is_reached[block]:
            is_reached[block] = hashes[block, 0] & (len(first) - 1) == bucket
            block = following[block] if is_reached[block] else NO_BLOCK
    return is_reached


# ---------------------------------------------------------------- all books at once


@njit(cache=True, nogil=True)
def add_readers(ref_cnt: Any, null_block: Any, block_ids: Any) -> Any:
    """Counts a reader of each block.

    Returns:
        The place of an id that is no block, then nothing is counted, or NONE_BAD; and the blocks
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
    return NONE_BAD, idle[:num_idle]


@njit(cache=True, nogil=True)
def allocate(
    ref_cnt: Any, free: Any, table: Any, num_free: Any, wanted: Any, block_ids: Any, forgotten: Any
) -> Any:
    """Finds a history's cached blocks, adds a reader to them, and takes new ones for the rest.

    Args:
        ref_cnt: readers of each block.
        free: the free list, which holds `num_free` blocks.
        table: of the cached blocks.
        num_free: blocks in the free list.
        wanted: hashes of the blocks that may be reused, int64 [n, words], n <= blocks.
        block_ids: takes the blocks of the whole history, cached ones first.
        forgotten: takes the new ones whose content could have been reused, as long as `block_ids`.

    Returns:
        How many were cached, or NO_ROOM, then nothing has changed; how many left the free list; how
        many are forgotten.
    """
    cached = find_prefix(table, wanted)
    num_idle = 0
    for block in cached:
        num_idle += ref_cnt[block] == 0
    num_new = len(block_ids) - len(cached)
    # Cached blocks that nobody reads are in the free list too and are about to leave it.
    if num_new > num_free - num_idle:
        return NO_ROOM, 0, 0
    _, idle = add_readers(ref_cnt, NO_BLOCK, cached)
    unlink(free, idle)
    new = walk(free, len(free.following) - 2, num_new)
    unlink(free, new)
    for block in new:
        ref_cnt[block] = 1
    removed = remove(table, new)
    block_ids[: len(cached)] = cached
    block_ids[len(cached) :] = new
    forgotten[: len(removed)] = removed
    return len(cached), len(idle) + num_new, len(removed)


@njit(cache=True, nogil=True)
def release(ref_cnt: Any, free: Any, has_hash: Any, null_block: Any, block_ids: Any) -> Any:
    """Counts a reader of each block less; those without any enter the free list.

    In the given order, those without a hash at its head and those with one at its tail.

    Returns:
        The place of an id that is not held, then nothing has changed, or NONE_BAD; how many blocks
        entered the free list at its head, and at its tail.
    """
    dead, reusable = np.empty_like(block_ids), np.empty_like(block_ids)
    num_dead = num_reusable = 0
    for i in range(len(block_ids)):
        block = block_ids[i]
        if not null_block < block < len(ref_cnt) or ref_cnt[block] < 1:
            for counted in block_ids[:i]:
                ref_cnt[counted] += 1
            return i, 0, 0
        ref_cnt[block] -= 1
        if ref_cnt[block] == 0 and has_hash[block]:
            reusable[num_reusable] = block
            num_reusable += 1
        elif ref_cnt[block] == 0:
            dead[num_dead] = block
            num_dead += 1
    head = len(free.following) - 2
    link(free, head, dead[:num_dead])
    link(free, free.preceding[head + 1], reusable[:num_reusable])
    return NONE_BAD, num_dead, num_reusable

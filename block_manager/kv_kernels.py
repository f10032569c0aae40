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

OWN_KEY = 1
MORE_KEYS = 2

IN_BUCKET = 0
OF_BLOCK = 1
BLOCK = 2


class FreeList(NamedTuple):
    """A doubly linked list; its two sentinels are the last two places."""

    following: Int32Array
    """int32 [num_ids + 2], UNLINKED where a block is not in the list."""
    preceding: Int32Array
    """Likewise."""


class HashTable(NamedTuple):
    """Blocks by the keys of their content; entries of a bucket are chained.

    A block's own key is the entry of the block's id. Further keys of a block, which an engine whose
    blocks can be reused from their middle gives it, are entries behind those of all blocks.
    """

    first: Int32Array
    """Entry of each bucket's chain, or NO_BLOCK, int32 [buckets], a power of two."""
    links: Int32Array
    """Of each entry IN_BUCKET: the next one in the chain; OF_BLOCK: the block's next key; both
    NO_BLOCK at the end; BLOCK: of an extra, whose key it is. int32 [3, num_ids + 1 + extras]. The
    entry behind those of the blocks is no key: OF_BLOCK it names the first unused extra, and that
    the next. Where no block ever had a further key, int32 [1, num_ids]."""
    hashes: npt.NDArray[np.int64]
    """int64 [num_ids + 1 + extras, words], or [num_ids, words] likewise; the first word's lowest
    bits are the bucket."""
    key_kinds: npt.NDArray[np.uint8]
    """Which kinds of key a block has: OWN_KEY, MORE_KEYS, both or 0, uint8 [num_ids]."""


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
    """Blocks that hold the leading keys (int64 [n, words]), up to the first that none holds."""
    first, links, hashes = table.first, table.links, table.hashes
    num_ids = len(table.key_kinds)
    found = np.empty(len(wanted), dtype=np.int64)
    # All buckets first: these reads do not wait for one another.
    for i in range(len(wanted)):
        found[i] = first[wanted[i, 0] & (len(first) - 1)]
    for i in range(len(wanted)):
        entry = found[i]
        while entry != NO_BLOCK and not _holds(hashes, entry, wanted, i):
            entry = links[IN_BUCKET, entry]
        if entry == NO_BLOCK:
            return found[:i]
        found[i] = entry if entry < num_ids else links[BLOCK, entry]
    return found


@njit(cache=True, nogil=True)
def entries_of(table: Any, wanted: Any) -> Any:
    """All entries of one key (int64 [1, words]) in the order in which they were made: int64."""
    entries = np.empty(0, dtype=np.int64)
    entry = table.first[wanted[0, 0] & (len(table.first) - 1)]
    while entry != NO_BLOCK:
        if _holds(table.hashes, entry, wanted, 0):
            entries = np.append(entries, entry)
        entry = table.links[IN_BUCKET, entry]
    return entries


# Many entries in one call: to hand the table over counts a reference to each of its arrays, which
# takes longer than an entry does.
@njit(cache=True, nogil=True)
def _chain(table: Any, entries: Any, words: Any) -> None:
    """Gives entries their keys and puts each at the end of its bucket's chain."""
    first, following, hashes = table.first, table.links[IN_BUCKET], table.hashes
    for i in range(len(entries)):
        entry = entries[i]
        for word in range(hashes.shape[1]):
            hashes[entry, word] = words[i, word]
        following[entry] = NO_BLOCK
        bucket = words[i, 0] & (len(first) - 1)
        last = first[bucket]
        if last == NO_BLOCK:
            first[bucket] = entry
            continue
        while following[last] != NO_BLOCK:
            last = following[last]
        following[last] = entry


@njit(cache=True, nogil=True)
def _unchain(table: Any, entries: Any) -> None:
    """Takes entries out of their buckets' chains."""
    first, following, hashes = table.first, table.links[IN_BUCKET], table.hashes
    for entry in entries:
        bucket = hashes[entry, 0] & (len(first) - 1)
        before = first[bucket]
        if before == entry:
            first[bucket] = following[entry]
            continue
        while following[before] != entry:
            before = following[before]
        following[before] = following[entry]


@njit(cache=True, nogil=True)
def insert(table: Any, block_ids: Any, words: Any) -> Any:
    """Gives each block its own key and puts it at the end of its bucket's chain.

    Returns:
        The place of a block that has its own key already or comes twice, then none is given one, or
        NONE_BAD; and how many blocks had no key at all.
    """
    kinds = table.key_kinds
    num_keyless = 0
    for i in range(len(block_ids)):
        kind = kinds[block_ids[i]]
        if kind & OWN_KEY:
            for marked in block_ids[:i]:
                kinds[marked] &= MORE_KEYS
            return i, 0
        num_keyless += kind == 0
        kinds[block_ids[i]] = kind | OWN_KEY
    _chain(table, block_ids, words)
    return NONE_BAD, num_keyless


@njit(cache=True, nogil=True)
def remove(table: Any, block_ids: Any) -> Any:
    """Takes all keys from distinct blocks and returns those that had one."""
    kinds = table.key_kinds
    removed, own = np.empty_like(block_ids), np.empty_like(block_ids)
    number = num_own = 0
    has_more = False
    for block in block_ids:
        kind = kinds[block]
        if kind == 0:
            continue
        removed[number] = block
        number += 1
        has_more |= kind & MORE_KEYS > 0
        if kind & OWN_KEY:
            own[num_own] = block
            num_own += 1
            kinds[block] = kind & MORE_KEYS
    _unchain(table, own[:num_own])
    if has_more:
        _remove_extras(table, removed[:number])
    return removed[:number]


@njit(cache=True, nogil=True)
def _remove_extras(table: Any, block_ids: Any) -> None:
    links = table.links
    for block in block_ids:
        while links[OF_BLOCK, block] != NO_BLOCK:
            remove_entry(table, links[OF_BLOCK, block])


@njit(cache=True, nogil=True)
def insert_extra(table: Any, block: Any, words: Any) -> None:
    """Gives a block one further key, int64 [1, words]; an extra must be unused."""
    links, num_ids = table.links, len(table.key_kinds)
    extra = links[OF_BLOCK, num_ids]
    links[OF_BLOCK, num_ids] = links[OF_BLOCK, extra]
    last = block
    while links[OF_BLOCK, last] != NO_BLOCK:
        last = links[OF_BLOCK, last]
    links[OF_BLOCK, last] = extra
    links[OF_BLOCK, extra] = NO_BLOCK
    links[BLOCK, extra] = block
    table.key_kinds[block] |= MORE_KEYS
    _chain(table, np.array([extra]), words)


@njit(cache=True, nogil=True)
def remove_entry(table: Any, entry: Any) -> None:
    """Takes one key from the block that has it."""
    links, num_ids = table.links, len(table.key_kinds)
    _unchain(table, np.array([entry]))
    if entry < num_ids:
        table.key_kinds[entry] &= MORE_KEYS
        return
    block = links[BLOCK, entry]
    before = block
    while links[OF_BLOCK, before] != entry:
        before = links[OF_BLOCK, before]
    links[OF_BLOCK, before] = links[OF_BLOCK, entry]
    if links[OF_BLOCK, block] == NO_BLOCK:
        table.key_kinds[block] &= OWN_KEY
    links[BLOCK, entry] = NO_BLOCK
    links[OF_BLOCK, entry] = links[OF_BLOCK, num_ids]
    links[OF_BLOCK, num_ids] = entry


@njit(cache=True, nogil=True)
def reached(table: Any) -> Any:
    """Which entries are in the chain of the bucket that their key names: bool [entries]."""
    first, links, hashes = table.first, table.links, table.hashes
    is_reached = np.zeros(len(hashes), dtype=np.bool_)
    for bucket in range(len(first)):
        entry = first[bucket]
        # An entry that was met before closes a ring, and its second place is wrong.
        while entry != NO_BLOCK and not is_reached[entry]:
            is_reached[entry] = hashes[entry, 0] & (len(first) - 1) == bucket
            entry = links[IN_BUCKET, entry] if is_reached[entry] else NO_BLOCK
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
def release(ref_cnt: Any, free: Any, kinds: Any, null_block: Any, block_ids: Any) -> Any:
    """Counts a reader of each block less; those without any enter the free list.

    In the given order, those without a key (`kinds`, uint8 [num_ids]) at its head and those with
    one at its tail.

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
        if ref_cnt[block] > 0:
            continue
        if kinds[block]:
            reusable[num_reusable] = block
            num_reusable += 1
        else:
            dead[num_dead] = block
            num_dead += 1
    head = len(free.following) - 2
    link(free, head, dead[:num_dead])
    link(free, free.preceding[head + 1], reusable[:num_reusable])
    return NONE_BAD, num_dead, num_reusable

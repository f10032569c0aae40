"""Which engines hold which KV blocks, by hash, and how much of a history each could reuse.

A block's entry is a set of engines, a bit for each. An engine may hold the same content in several
blocks and reports each of them when it comes and when it goes; copies beyond the first are counted
aside, since they are few. A hash is known by its low 64 bits: should two ever meet, the router
expects too much of one engine once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from block_manager.block_hash import BLOCK_HASH_BYTES
from router.cost import Int64Array
from router.hash_table import HashTable, erase, is_vacant, place_of

BITS = 64
"""Engines to a word."""
_LOW_64 = (1 << 64) - 1
_KEY_BYTES = 8


def hash_keys(hashes: Sequence[bytes | int]) -> Int64Array:
    """What hashes are known by: their low 64 bits, int64 [n].

    Engines may send all bytes of a hash, or these bits as a whole number (vLLM reads the bytes as a
    big-endian number).
    """
    if not hashes:
        return np.empty(0, dtype=np.int64)
    if isinstance(hashes[0], bytes) and len(hashes[0]) == BLOCK_HASH_BYTES:
        try:
            joined = b"".join(hashes)  # type: ignore[arg-type]
        except TypeError:
            joined = b""
        if len(joined) == BLOCK_HASH_BYTES * len(hashes):
            words = np.frombuffer(joined, dtype=">i8").reshape(len(hashes), -1)
            return words[:, -1].astype(np.int64)
    keys = [
        int.from_bytes(one[-_KEY_BYTES:], "big") if isinstance(one, bytes) else one & _LOW_64
        for one in hashes
    ]
    return np.array(keys, dtype=np.uint64).view(np.int64)


class PrefixIndex:
    """Keys of blocks to engine slots. Not thread-safe."""

    def __init__(self) -> None:
        self._holders = HashTable(1)
        self._copies: list[HashTable] = []
        """Of each slot: by key, how many blocks with that content beyond the first."""

    def __len__(self) -> int:
        """Distinct blocks that any engine holds."""
        return self._holders.size

    def add_slot(self, slot: int) -> None:
        """Makes room for an engine."""
        self._holders.widen(slot // BITS + 1)
        while len(self._copies) <= slot:
            self._copies.append(HashTable(1))

    def store(self, slot: int, keys: Int64Array) -> None:
        """The engine has one more block of each key (int64 [n])."""
        holders, copies = self._holders, self._copies[slot]
        holders.reserve(len(keys))
        copies.reserve(len(keys))
        num_new, num_copied = _store(
            holders.keys, holders.values, copies.keys, copies.values, slot, keys
        )
        holders.size += num_new
        copies.size += num_copied

    def remove(self, slot: int, keys: Int64Array) -> None:
        """The engine has one block less of each key (int64 [n]); unknown ones are passed over."""
        holders, copies = self._holders, self._copies[slot]
        num_gone, num_single = _remove(
            holders.keys, holders.values, copies.keys, copies.values, slot, keys
        )
        holders.size -= num_gone
        copies.size -= num_single

    def clear(self, slot: int) -> None:
        """The engine has no block at all."""
        self._holders.drop_bit(slot // BITS, slot % BITS)
        self._copies[slot] = HashTable(1)

    def count(self, slot: int) -> int:
        """Distinct blocks that an engine holds."""
        bits = self._holders.values[:, slot // BITS] >> (slot % BITS) & 1
        return int(bits.sum())

    def prefix_blocks(self, keys: Int64Array, num_slots: int) -> Int64Array:
        """Leading ones of the keys (int64 [n]) that each engine holds without a gap: int64 [E]."""
        found: Int64Array = _prefix_blocks(
            self._holders.keys, self._holders.values, keys, num_slots
        )
        return found


@njit(cache=True, nogil=True)
def _store(keys: Any, holders: Any, copy_keys: Any, copies: Any, slot: Any, new_keys: Any) -> Any:
    """Adds the slot to each key; returns how many keys, and how many counted copies, are new."""
    word, bit = slot // BITS, np.int64(1) << (slot % BITS)
    num_new = num_copied = 0
    for key in new_keys:
        place = place_of(keys, holders, key)
        if holders[place, word] & bit == 0:
            num_new += is_vacant(holders, place)
            keys[place] = key
            holders[place, word] |= bit
            continue
        place = place_of(copy_keys, copies, key)
        num_copied += copies[place, 0] == 0
        copy_keys[place] = key
        copies[place, 0] += 1
    return num_new, num_copied


@njit(cache=True, nogil=True)
def _remove(keys: Any, holders: Any, copy_keys: Any, copies: Any, slot: Any, old_keys: Any) -> Any:
    """Takes the slot from each key; returns how many keys and how many counted copies are gone."""
    word, bit = slot // BITS, np.int64(1) << (slot % BITS)
    num_gone = num_single = 0
    for key in old_keys:
        place = place_of(keys, holders, key)
        if holders[place, word] & bit == 0:
            continue
        copy = place_of(copy_keys, copies, key)
        if copies[copy, 0] > 1:
            copies[copy, 0] -= 1
        elif copies[copy, 0] == 1:
            erase(copy_keys, copies, copy)
            num_single += 1
        else:
            holders[place, word] &= ~bit
            if is_vacant(holders, place):
                erase(keys, holders, place)
                num_gone += 1
    return num_gone, num_single


@njit(cache=True, nogil=True)
def _prefix_blocks(keys: Any, holders: Any, wanted: Any, num_slots: Any) -> Any:
    found = np.zeros(num_slots, dtype=np.int64)
    num_words = holders.shape[1]
    # Engines that hold all blocks so far.
    left = np.full(num_words, -1, dtype=np.int64)
    for number in range(len(wanted)):
        place = place_of(keys, holders, wanted[number])
        any_left = np.int64(0)
        for word in range(num_words):
            dropped = left[word] & ~holders[place, word]
            left[word] &= holders[place, word]
            any_left |= left[word]
            if dropped != 0:
                for slot in range(BITS * word, min(BITS * (word + 1), num_slots)):
                    if dropped >> (slot % BITS) & 1:
                        found[slot] = number
        if any_left == 0:
            return found
    for slot in range(num_slots):
        if left[slot // BITS] >> (slot % BITS) & 1:
            found[slot] = len(wanted)
    return found

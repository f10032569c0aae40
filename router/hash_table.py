"""A hash table from 64-bit hashes to a few words, over arrays that kernels work on.

Open addressing with linear probing; an entry whose words are all 0 is vacant, and what follows a
removed entry moves up, so there are no tombstones (Knuth, The Art of Computer Programming, volume
3, section 6.4, algorithms L and R). Keys are low bits of cryptographic hashes and spread by
themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from router.cost import Int64Array

_FEWEST = 64
"""Entries of an empty table; a power of two."""
ABSENT = -1


class HashTable:
    """Keys int64 [entries] and values int64 [entries, words]; kernels read and write both."""

    def __init__(self, num_words: int) -> None:
        self.keys: Int64Array = np.zeros(_FEWEST, dtype=np.int64)
        self.values: Int64Array = np.zeros((_FEWEST, num_words), dtype=np.int64)
        self.size = 0
        """Entries in use; whoever lets a kernel change that says so here."""

    def reserve(self, num_more: int) -> None:
        """Makes room for so many more entries; at most two thirds are ever in use."""
        wanted = 3 * (self.size + num_more) // 2
        if wanted < len(self.keys):
            return
        self._move_to(1 << wanted.bit_length())

    def widen(self, num_words: int) -> None:
        """Gives every value more words, 0 at first."""
        more = num_words - self.values.shape[1]
        if more > 0:
            self.values = np.pad(self.values, ((0, 0), (0, more)))

    def drop_bit(self, word: int, bit: int) -> None:
        """Clears one bit of one word in all values; entries that become 0 are gone."""
        clear_bit(self.values, word, bit)
        self.size = int(np.count_nonzero(self.values.any(axis=1)))
        self._move_to(max(_FEWEST, 1 << (3 * self.size // 2).bit_length()))

    def _move_to(self, num_entries: int) -> None:
        keys, values = self.keys, self.values
        self.keys = np.zeros(num_entries, dtype=np.int64)
        self.values = np.zeros((num_entries, values.shape[1]), dtype=np.int64)
        copy_entries(keys, values, self.keys, self.values)


@njit(cache=True, nogil=True)
def is_vacant(values: Any, place: Any) -> Any:
    """Whether no key is at a place."""
    for word in range(values.shape[1]):  # noqa: SIM110
        if values[place, word] != 0:
            return False
    return True


@njit(cache=True, nogil=True)
def place_of(keys: Any, values: Any, key: Any) -> Any:
    """The place where a key is, or the vacant one where it would be put."""
    place = key & (len(keys) - 1)
    while keys[place] != key and not is_vacant(values, place):
        place = (place + 1) & (len(keys) - 1)
    return place


@njit(cache=True, nogil=True)
def erase(keys: Any, values: Any, place: Any) -> None:
    """Makes a place vacant and closes the gap."""
    last = len(keys) - 1
    gap = place
    follower = (gap + 1) & last
    while not is_vacant(values, follower):
        home = keys[follower] & last
        # Not if its home lies behind the gap: lookups for it start there.
        if (follower - home) & last >= (follower - gap) & last:
            keys[gap] = keys[follower]
            values[gap] = values[follower]
            gap = follower
        follower = (follower + 1) & last
    keys[gap] = 0
    values[gap] = 0


@njit(cache=True, nogil=True)
def clear_bit(values: Any, word: Any, bit: Any) -> None:
    """Clears a bit in one word of all values."""
    kept = ~(np.int64(1) << bit)
    for place in range(len(values)):
        values[place, word] &= kept


@njit(cache=True, nogil=True)
def copy_entries(keys: Any, values: Any, new_keys: Any, new_values: Any) -> None:
    """Puts all entries into an empty table that has room for them."""
    for place in range(len(keys)):
        if not is_vacant(values, place):
            new = place_of(new_keys, new_values, keys[place])
            new_keys[new] = keys[place]
            new_values[new] = values[place]

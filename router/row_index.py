"""Which engines hold which embedding rows, and how many rows of a request each would have to load.

One set of engines, a bit for each, at every position of the row digest
(`block_manager.row_digest`), so what is known of a row is one read whatever the number of engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from block_manager.row_digest import position_of_rows
from router.cost import Int64Array
from router.prefix_index import BITS

_NO_ROW = -1
_GOLDEN = np.int64(0x9E3779B97F4A7C15 - (1 << 64))
"""See `block_manager.row_digest`."""
_HALF_WORD = np.int64(32)


class RowIndex:
    """Positions of the row digest to engine slots. Not thread-safe."""

    def __init__(self) -> None:
        self.num_rows = 0
        """Of the catalogue; 0 until an engine says."""
        self.num_positions = 0
        """Of the digest; 0 until an engine says."""
        self._num_words = 1
        self._holders: Int64Array = np.zeros((0, 1), dtype=np.int64)
        self._nobody: Int64Array = np.zeros((0, 1), dtype=np.int64)

    def set_size(self, num_rows: int, num_positions: int) -> None:
        """Takes the sizes of the catalogue and of the digest; what was known is forgotten."""
        self.num_rows, self.num_positions = num_rows, num_positions
        self._holders = np.zeros((num_positions, self._num_words), dtype=np.int64)

    def add_slot(self, slot: int) -> None:
        """Makes room for an engine."""
        more = slot // BITS + 1 - self._num_words
        if more > 0:
            self._num_words += more
            self._holders = np.pad(self._holders, ((0, 0), (0, more)))
            self._nobody = self._holders[:0].copy()

    def store(self, slot: int, positions: Int64Array) -> None:
        """The engine holds a row at each position, int64 [n], all below `num_positions`."""
        _set_bit(self._holders, slot // BITS, slot % BITS, positions)

    def remove(self, slot: int, positions: Int64Array) -> None:
        """The engine holds no row at each position, int64 [n], all below `num_positions`."""
        _clear_bit(self._holders, slot // BITS, slot % BITS, positions)

    def clear(self, slot: int) -> None:
        """The engine holds no row at all."""
        self._holders[:, slot // BITS] &= ~(np.int64(1) << np.int64(slot % BITS))

    def count(self, slot: int) -> int:
        """Positions at which an engine holds a row."""
        bits = self._holders[:, slot // BITS] >> (slot % BITS) & 1
        return int(bits.sum())

    def missing(
        self,
        rows: Int64Array,
        candidate_rows: Int64Array,
        cached_tokens: Int64Array,
        is_known: bool = True,
    ) -> Int64Array:
        """Distinct rows that each engine needs and does not hold.

        Args:
            rows: row of each context token, below 0 where it takes none, int64 [tokens].
            candidate_rows: likewise, int64 [candidates].
            cached_tokens: leading tokens whose rows each engine does not need, int64 [E].
            is_known: without it every engine is taken to hold no row at all.

        Returns:
            int64 [E].
        """
        # A copy, whoever's memory the rows are in: kernels are compiled for one kind of array.
        needed = np.concatenate((rows, candidate_rows), dtype=np.int64)
        missing: Int64Array = _missing(
            needed,
            position_of_rows(needed, self.num_rows, self.num_positions),
            cached_tokens,
            self._holders if is_known else self._nobody,
        )
        return missing


@njit(cache=True, nogil=True)
def _set_bit(holders: Any, word: Any, bit: Any, positions: Any) -> None:
    mask = np.int64(1) << bit
    for position in positions:
        holders[position, word] |= mask


@njit(cache=True, nogil=True)
def _clear_bit(holders: Any, word: Any, bit: Any, positions: Any) -> None:
    mask = ~(np.int64(1) << bit)
    for position in positions:
        holders[position, word] &= mask


@njit(cache=True, nogil=True)
def _is_new(row: Any, seen: Any) -> Any:
    """Whether a row comes for the first time; `seen` is a hash set, NO_ROW where vacant."""
    last = len(seen) - 1
    place = row * _GOLDEN >> _HALF_WORD & last
    while seen[place] != _NO_ROW:
        if seen[place] == row:
            return False
        place = (place + 1) & last
    seen[place] = row
    return True


@njit(cache=True, nogil=True)
def _count_lacking(
    missing: Any, holders: Any, position: Any, cached_tokens: Any, place: Any
) -> None:
    """Counts a row for every engine that needs what is at a place and does not hold the row."""
    is_told = 0 <= position < len(holders)
    for word in range(holders.shape[1]):
        held = holders[position, word] if is_told else np.int64(0)
        first = BITS * word
        for slot in range(first, min(first + BITS, len(missing))):
            missing[slot] += (cached_tokens[slot] <= place) & ~(held >> (slot - first)) & 1


@njit(cache=True, nogil=True)
def _missing(rows: Any, positions: Any, cached_tokens: Any, holders: Any) -> Any:
    """See `RowIndex.missing`; candidates stand behind the tokens, so none of them is cached."""
    missing = np.zeros(len(cached_tokens), dtype=np.int64)
    first = len(rows)
    for cached in cached_tokens:
        first = min(first, cached)
    num_entries = 2
    while num_entries < 2 * (len(rows) - first):
        num_entries *= 2
    seen = np.full(num_entries, _NO_ROW, dtype=np.int64)
    # From the end on: an engine that has the last use of a row cached has all of them cached.
    for place in range(len(rows) - 1, first - 1, -1):
        if rows[place] >= 0 and _is_new(rows[place], seen):
            _count_lacking(missing, holders, positions[place], cached_tokens, place)
    return missing

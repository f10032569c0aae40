"""The distinct rows of a step, where each of its tokens finds its own, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from numba import njit

NO_ROW = -1
"""In place of a row: this token takes none."""

_UNMARKED = -1

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class Distinct(NamedTuple):
    """Distinct rows in the order of their first appearance."""

    row_ids: Int64Array
    """int64 [n]."""
    places: Int64Array
    """Place of each token's row among them, or NO_ROW, int64 [tokens]."""
    counts: Int64Array
    """How many tokens take each, int64 [n]."""


class DistinctRows:
    """Finds distinct rows by marking them in a dense array: sorting takes several times as long.

    Not thread-safe: the marks are shared by all calls.
    """

    def __init__(self, num_rows: int) -> None:
        self._place_of_row = np.full(num_rows, _UNMARKED, dtype=np.int32)

    def of(self, rows: Int64Array) -> Distinct:
        """Distinct ones of rows (int64 [tokens], NO_ROW among them), each below `num_rows`.

        Raises:
            IndexError: a row is beyond the last.
        """
        row_ids, places, counts = _collect(rows, self._place_of_row)
        if len(places) != len(rows):
            self._refuse(rows)
        return Distinct(row_ids, places, counts)

    def count(
        self, rows: Int64Array, lengths: Sequence[int], slot_of_row: Int32Array
    ) -> Int64Array:
        """How many distinct rows each part has, and how many of these are in the pool.

        Args:
            rows: parts behind one another (int64 [tokens], NO_ROW among them), each below
                `num_rows`.
            lengths: tokens of each part, one part at least.
            slot_of_row: below 0 where a row is not in the pool, int32 [num_rows].

        Returns:
            Both numbers of each part, int64 [parts, 2].

        Raises:
            IndexError: a row is beyond the last.
        """
        counts: Int64Array = _count(rows, np.array(lengths), slot_of_row, self._place_of_row)
        if len(counts) != len(lengths):
            self._refuse(rows)
        return counts

    def _refuse(self, rows: Int64Array) -> NoReturn:
        raise IndexError(f"row {rows.max()} is beyond the last of {len(self._place_of_row)}")


@njit(nogil=True, cache=True)
def _are_within(rows: Any, num_rows: Any) -> Any:
    largest = -1
    for row in rows:
        largest = max(largest, row)
    return largest < num_rows


@njit(nogil=True, cache=True)
def _collect(rows: Any, place_of_row: Any) -> Any:
    """Fields of `Distinct`, empty where a row is beyond the last."""
    if not _are_within(rows, len(place_of_row)):
        return rows[:0].copy(), rows[:0].copy(), rows[:0].copy()
    row_ids, places, counts = np.empty_like(rows), np.empty_like(rows), np.empty_like(rows)
    number = 0
    for token in range(len(rows)):
        row = rows[token]
        if row < 0:
            places[token] = NO_ROW
            continue
        place = place_of_row[row]
        if place < 0:
            place = number
            place_of_row[row] = place
            row_ids[place] = row
            counts[place] = 0
            number += 1
        places[token] = place
        counts[place] += 1
    for place in range(number):
        place_of_row[row_ids[place]] = _UNMARKED
    return row_ids[:number], places, counts[:number]


@njit(nogil=True, cache=True)
def _count(rows: Any, lengths: Any, slot_of_row: Any, place_of_row: Any) -> Any:
    """See `DistinctRows.count`; no part where a row is beyond the last."""
    if not _are_within(rows, len(place_of_row)):
        return np.empty((0, 2), dtype=np.int64)
    counts = np.zeros((len(lengths), 2), dtype=np.int64)
    end = 0
    for part in range(len(lengths)):
        first, end = end, end + lengths[part]
        number = resident = 0
        for token in range(first, end):
            row = rows[token]
            # Marked by the part, so nothing is to be wiped off between two of them.
            if row >= 0 and place_of_row[row] != part:
                place_of_row[row] = part
                number += 1
                resident += slot_of_row[row] >= 0
        counts[part, 0], counts[part, 1] = number, resident
    for row in rows:
        if row >= 0:
            place_of_row[row] = _UNMARKED
    return counts

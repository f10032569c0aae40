"""The distinct rows of a step, and where each of its tokens finds its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

NO_ROW = -1
"""In place of a row: this token takes none."""

Int64Array = npt.NDArray[np.int64]


class Distinct(NamedTuple):
    """Distinct rows in the order of their first appearance."""

    row_ids: Int64Array
    """int64 [n]."""
    places: Int64Array
    """Place of each token's row among them, or NO_ROW, int64 [tokens]."""
    counts: Int64Array
    """How many tokens take each, int64 [n]."""


@njit(nogil=True, cache=True)
def _collect(
    rows: Any, place_of_row: Any, row_ids: Any, places: Any, counts: Any
) -> int:  # pragma: no cover
    number = 0
    for token in range(len(rows)):
        row = rows[token]
        if row < 0:
            places[token] = -1
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
        place_of_row[row_ids[place]] = -1
    return number


class DistinctRows:
    """Finds distinct rows by marking them in a dense array: sorting takes several times as long.

    Not thread-safe: the marks are shared by all calls.
    """

    def __init__(self, num_rows: int) -> None:
        self._place_of_row = np.full(num_rows, -1, dtype=np.int32)

    def of(self, rows: Int64Array) -> Distinct:
        """Distinct ones of rows (int64 [tokens], NO_ROW among them), each below `num_rows`.

        Raises:
            IndexError: a row is beyond the last.
        """
        if len(rows) and rows.max() >= len(self._place_of_row):
            raise IndexError(f"row {rows.max()} is beyond the last of {len(self._place_of_row)}")
        row_ids, places, counts = (np.empty(len(rows), dtype=np.int64) for _ in range(3))
        number = _collect(rows, self._place_of_row, row_ids, places, counts)
        return Distinct(row_ids[:number], places, counts[:number])

"""Which embedding rows deserve a slot: frequency with ageing.

The admission idea is TinyLFU's (Einziger, Friedman and Manes, 2017): a newcomer displaces a
resident row only if it was asked for more often of late.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

RowIds = npt.NDArray[np.int64]

_AGEING_ACCESSES_PER_SLOT = 10
_ROWS_HALVED_PER_ACCESS = 64
"""Limit of what ageing a large table may cost an access when there are few slots."""
_MAX_COUNT = int(np.iinfo(np.uint8).max)


class AgedFrequency:
    """A saturating count per row, halved after ten accesses per slot (for few slots, later)."""

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self._counts = np.zeros(num_rows, dtype=np.uint8)
        self._period = max(
            1, _AGEING_ACCESSES_PER_SLOT * num_slots, num_rows // _ROWS_HALVED_PER_ACCESS
        )
        self._accesses = 0

    def record(self, row_ids: RowIds, times: npt.NDArray[np.int64]) -> None:
        """Counts accesses of distinct rows (int64 [n]), `times` (int64 [n]) of each."""
        self._accesses += _add(self._counts, row_ids, times)
        if self._accesses >= self._period:
            self._accesses = 0
            self._counts >>= 1

    def hotness(self, row_ids: RowIds) -> npt.NDArray[np.uint8]:
        """How hot rows are, comparable across rows: uint8 [n]."""
        return self._counts[row_ids]


@njit(nogil=True, cache=True)
def _add(counts: Any, row_ids: Any, times: Any) -> Any:
    """Adds to the rows' counts, which stop at the largest; returns the sum of `times`."""
    total = 0
    for place in range(len(row_ids)):
        row = row_ids[place]
        counts[row] = min(counts[row] + times[place], _MAX_COUNT)
        total += times[place]
    return total

"""Which embedding rows deserve a slot: frequency with ageing.

The admission idea is TinyLFU's (Einziger, Friedman and Manes, 2017): a newcomer displaces a
resident row only if it was asked for more often of late. Rows without a slot are counted too, so
the hottest of them are known when a page comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.exceptions import IntegrityError

RowIds = npt.NDArray[np.int64]

_AGEING_ACCESSES_PER_SLOT = 10
_ROWS_HALVED_PER_ACCESS = 64
"""Limit of what ageing a large table may cost an access when there are few slots."""
_MAX_COUNT = int(np.iinfo(np.uint8).max)


class AgedFrequency:
    """A saturating count per row, halved after ten accesses per slot (for few slots, later)."""

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self._counts = np.zeros(num_rows, dtype=np.uint8)
        self._rows_of_count = np.zeros(_MAX_COUNT + 1, dtype=np.int64)
        self._rows_of_count[0] = num_rows
        self._accesses = 0
        self.num_accesses = 0
        """Since the start."""
        self.resize(num_slots)

    def resize(self, num_slots: int) -> None:
        """Takes the number of slots, which sets how fast counts age."""
        self._period = max(
            1,
            _AGEING_ACCESSES_PER_SLOT * num_slots,
            len(self._counts) // _ROWS_HALVED_PER_ACCESS,
        )

    @property
    def counts(self) -> npt.NDArray[np.uint8]:
        """How hot every row is, uint8 [num_rows]; not to be written to."""
        return self._counts

    def record(self, row_ids: RowIds, times: npt.NDArray[np.int64]) -> None:
        """Counts accesses of distinct rows (int64 [n]), `times` (int64 [n]) of each."""
        accesses = _add(self._counts, self._rows_of_count, row_ids, times)
        self.num_accesses += accesses
        self._accesses += accesses
        if self._accesses >= self._period:
            self._accesses = 0
            self._counts >>= 1
            halved = self._rows_of_count.reshape(-1, 2).sum(axis=1)
            self._rows_of_count[: len(halved)] = halved
            self._rows_of_count[len(halved) :] = 0

    def hotness(self, row_ids: RowIds) -> npt.NDArray[np.uint8]:
        """How hot rows are, comparable across rows: uint8 [n]."""
        return self._counts[row_ids]

    def deserving(self, num_slots: int) -> int:
        """The least hotness, 1 or more, at which all rows that are as hot fit so many slots."""
        at_least = np.cumsum(self._rows_of_count[::-1])[::-1]
        return 1 + int(np.count_nonzero(at_least[1:] > num_slots))

    def share_of_ranks(self, first: int, last: int) -> float:
        """Share of late accesses that went to the rows of ranks first .. last - 1 by hotness."""
        counts, rows = np.arange(_MAX_COUNT, -1, -1), self._rows_of_count[::-1]
        ends = np.cumsum(rows)
        within = np.maximum(np.minimum(ends, last) - np.maximum(ends - rows, first), 0)
        return float(within @ counts) / max(1.0, float(rows @ counts))

    def check_integrity(self) -> None:
        """The rows of each count are as many as they are counted.

        Raises:
            IntegrityError: they are not.
        """
        counted = np.bincount(self._counts, minlength=len(self._rows_of_count))
        if not np.array_equal(counted, self._rows_of_count):
            raise IntegrityError("EMB: the rows of some hotness are miscounted")


@njit(nogil=True, cache=True)
def _add(counts: Any, rows_of_count: Any, row_ids: Any, times: Any) -> Any:
    """Adds to the rows' counts, which stop at the largest; returns the sum of `times`."""
    total = 0
    for place in range(len(row_ids)):
        row = row_ids[place]
        before = counts[row]
        after = min(before + times[place], _MAX_COUNT)
        counts[row] = after
        rows_of_count[before] -= 1
        rows_of_count[after] += 1
        total += times[place]
    return total

"""The host tier: where all rows of all pooled tables always are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

HOST_NUMBER_BYTES = 4
"""Rows are float32 there, whatever the device keeps."""


class HostStore(Protocol):
    """Source of embedding rows."""

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        ...

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Copies of rows (int64 [n], each within the tables): float32 [n, D].

        Raises:
            RowsUnavailableError: the rows cannot be had now.
        """
        ...


class MemoryMappedTables:
    """Rows of table files, through the operating system's page cache; tables lie end to end."""

    def __init__(self, tables: Sequence[npt.NDArray[np.float32]]) -> None:
        """Takes memory maps, float32 [rows, D] each, all of one width."""
        self._tables = tables
        self._ends = np.cumsum([len(table) for table in tables])

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return int(self._ends[-1])

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Copies of rows (int64 [n]): float32 [n, D]."""
        if len(self._tables) == 1:
            return np.take(self._tables[0], row_ids, axis=0)
        if len(row_ids) and row_ids.max() >= self.num_rows:
            raise IndexError(f"row {row_ids.max()} is beyond the last table's end")
        rows = np.empty((len(row_ids), self._tables[0].shape[1]), dtype=np.float32)
        owners = np.searchsorted(self._ends, row_ids, side="right")
        for place, table in enumerate(self._tables):
            own = owners == place
            rows[own] = np.take(table, row_ids[own] - (self._ends[place] - len(table)), axis=0)
        return rows

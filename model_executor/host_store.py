"""The host tier: where all rows of a table always are."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class HostStore(Protocol):
    """Source of embedding rows."""

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        ...

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Copies of rows (int64 [n], each within the table): float32 [n, D].

        Raises:
            RowsUnavailableError: the rows cannot be had now.
        """
        ...


class MemoryMappedTable:
    """Rows of a table file, through the operating system's page cache."""

    def __init__(self, table: npt.NDArray[np.float32]) -> None:
        """Takes a memory map, float32 [rows, D]."""
        self._table = table

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self._table)

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Copies of rows (int64 [n]): float32 [n, D]."""
        return np.take(self._table, row_ids, axis=0)

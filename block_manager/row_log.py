"""Which embedding rows came and went, noted while steps change the tenant's books."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SomeRows = npt.NDArray[np.signedinteger[Any]]
"""int32 or int64 [n]."""
RowParts = list[SomeRows]


class RowTraffic(NamedTuple):
    """Rows that came and rows that went, each as often as it did."""

    came: RowParts
    went: RowParts


class RowLog:
    """Traffic since it was last taken; for the thread that steps."""

    def __init__(self) -> None:
        self._came: RowParts = []
        self._went: RowParts = []

    def came(self, rows: SomeRows) -> None:
        """Notes rows that can be hit from now on; nobody changes the array any more."""
        if len(rows):
            self._came.append(rows)

    def went(self, rows: SomeRows) -> None:
        """Notes rows that can no longer be hit; likewise."""
        if len(rows):
            self._went.append(rows)

    def take(self) -> RowTraffic:
        """Drains the traffic."""
        traffic = RowTraffic(self._came, self._went)
        self._came, self._went = [], []
        return traffic

"""Which embedding rows came and went, noted while steps change the tenant's books."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

RowArrays = Sequence[npt.NDArray[np.signedinteger[Any]]]
"""Rows in parts, each an array of int32 or int64."""


class RowTraffic(NamedTuple):
    """Rows that came and rows that went, each as often as it did."""

    came: RowArrays
    went: RowArrays


_NONE = RowTraffic((), ())


class RowLog:
    """Traffic since it was last taken; for the thread that steps."""

    def __init__(self) -> None:
        self._came: list[npt.NDArray[np.signedinteger[Any]]] = []
        self._went: list[npt.NDArray[np.signedinteger[Any]]] = []

    def came(self, rows: npt.NDArray[np.signedinteger[Any]]) -> None:
        """Notes rows that can be hit from now on; the array is nobody else's."""
        if len(rows):
            self._came.append(rows)

    def went(self, rows: npt.NDArray[np.signedinteger[Any]]) -> None:
        """Notes rows that can no longer be hit; likewise."""
        if len(rows):
            self._went.append(rows)

    def take(self) -> RowTraffic:
        """Drains the traffic."""
        if not self._came and not self._went:
            return _NONE
        traffic = RowTraffic(self._came, self._went)
        self._came, self._went = [], []
        return traffic

"""What the EMB tenant asks the executor to do with rows: load for a step, move, refill."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from block_manager.row_policy import RowIds

NOWHERE = -1
"""In place of a slot: the row has none."""

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where the distinct rows of a step are, or will be once loaded; all arrays have length n."""

    row_ids: RowIds
    resident: npt.NDArray[np.bool_]
    """Already in the pool; the others must be loaded from the host."""
    slots: npt.NDArray[np.int64]
    """The row's slot, or NOWHERE when it was not admitted."""
    staging: npt.NDArray[np.int64]
    """The row's place in staging, or NOWHERE when it has a slot."""
    num_missing: int
    """Rows that are not resident."""

    @property
    def admitted(self) -> npt.NDArray[np.int64]:
        """Which rows must be loaded into their slots: places in the arrays, int64, ascending."""
        if not self.num_missing:
            return _NOTHING
        return np.flatnonzero(~self.resident & (self.slots != NOWHERE))

    @property
    def staged(self) -> npt.NDArray[np.int64]:
        """Which rows must be loaded into staging, likewise."""
        return np.flatnonzero(self.staging != NOWHERE) if self.num_missing else _NOTHING


@dataclass(frozen=True, slots=True)
class RowMoves:
    """Rows to copy from slot to slot on the device. No source is a destination."""

    sources: npt.NDArray[np.int64] = field(default_factory=lambda: _NOTHING)
    """int64 [n]; their page may be another tenant's once the copies are made."""
    destinations: npt.NDArray[np.int64] = field(default_factory=lambda: _NOTHING)
    """int64 [n], distinct."""

    def __len__(self) -> int:
        """Rows to copy."""
        return len(self.sources)


@dataclass(frozen=True, slots=True)
class RefillPlan:
    """Rows to load in the background because they will probably be needed; arrays of length n."""

    row_ids: RowIds
    """Distinct, hottest first."""
    slots: npt.NDArray[np.int64]
    """Reserved for them until the plan is committed or abandoned."""

    def __len__(self) -> int:
        """Rows to load."""
        return len(self.row_ids)

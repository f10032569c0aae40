"""Which embedding rows an engine holds, told in few bytes: a set of positions, by its changes.

A position is the row itself while the table is small; a larger table is hashed onto a fixed number
of positions. The engine counts the rows at each position, so that a position is said to be empty
when its last row went and the digest never drifts. Whoever reads it learns of every row that is
there; of rows that are absent it takes some for present, namely those that share a position with a
resident one: the share of the positions that are in use.

The hash is Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, section 6.4): rows
that follow one another, as popular ones often do, come to lie far apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.events import RowsCleared, RowsRemoved, RowsStored
from block_manager.exceptions import IntegrityError
from block_manager.row_log import RowParts, RowTraffic

RowIds = npt.NDArray[np.int64]
RowEvent = RowsStored | RowsRemoved | RowsCleared
Positions = npt.NDArray[np.uint32]
"""Ascending and distinct where they come from a digest."""

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
"""2 ** 64 over the golden ratio."""
_HALF = np.uint64(32)
_WIRE = np.dtype("<u4")
_POSITIONS_PER_EVENT = 1 << 20
"""Of an event that tells all that is there: a message of four megabytes."""
_NOTHING = np.empty(0, dtype=np.int64)


@njit(cache=True, nogil=True)
def position_of_row(row: Any, num_rows: Any, num_positions: Any) -> Any:
    """One row's position, for kernels; see `position_of_rows`."""
    if num_rows <= num_positions:
        return np.uint64(row)
    hashed = (np.uint64(row) * _GOLDEN_RATIO) >> _HALF
    return (hashed * np.uint64(num_positions)) >> _HALF


def position_of_rows(rows: RowIds, num_rows: int, num_positions: int) -> Positions:
    """Where the digest of a table says whether rows are there.

    Args:
        rows: int64 [n], each within 0..num_rows - 1.
        num_rows: of the table.
        num_positions: of the digest, 2**32 at most.

    Returns:
        uint32 [n], each below `num_positions`; the rows themselves where there are enough of them.
    """
    if num_rows <= num_positions:
        return rows.astype(np.uint32)
    hashed = (rows.astype(np.uint64) * _GOLDEN_RATIO) >> _HALF
    return ((hashed * np.uint64(num_positions)) >> _HALF).astype(np.uint32)


def pack_positions(positions: Positions) -> bytes:
    """Positions as events carry them."""
    return positions.astype(_WIRE, copy=False).tobytes()


def unpack_positions(packed: bytes) -> Positions:
    """Positions of an event, uint32 [n]; not to be written to.

    Raises:
        ValueError: the bytes are no whole number of positions.
    """
    return np.frombuffer(packed, dtype=_WIRE).astype(np.uint32, copy=False)


@njit(cache=True, nogil=True)
def _add(rows: Any, number: Any, counts: Any, num_rows: Any) -> None:
    for row in rows:
        counts[position_of_row(row, num_rows, len(counts))] += number


@njit(cache=True, nogil=True)
def _compare(
    rows: Any, counts: Any, is_said: Any, num_rows: Any, changed: Any, number: Any
) -> tuple[Any, Any]:
    """Appends the rows' positions that are other than was said to `changed`, which has `number`.

    Returns:
        How many it has now; whether no count is below 0.
    """
    is_sound = True
    for row in rows:
        position = position_of_row(row, num_rows, len(counts))
        is_sound &= counts[position] >= 0
        if (counts[position] > 0) != is_said[position]:
            is_said[position] = not is_said[position]
            changed[number] = position
            number += 1
    return number, is_sound


class RowChanges(NamedTuple):
    """Positions that are other than the digest last said."""

    stored: Positions
    """They hold a row now."""
    removed: Positions
    """They hold none now."""

    def events(self) -> list[RowEvent]:
        """The changes as messages; none where nothing changed."""
        events: list[RowEvent] = []
        if len(self.removed):
            events.append(RowsRemoved(pack_positions(self.removed)))
        if len(self.stored):
            events.append(RowsStored(pack_positions(self.stored)))
        return events


class RowDigest:
    """Counts the resident rows of a table by position; begins with none.

    It takes 5 bytes for each position.
    """

    def __init__(self, num_rows: int, limit: int) -> None:
        """Takes the rows of the table, and how many positions there may be: 1..2**32."""
        self.num_rows = num_rows
        self.num_positions = min(num_rows, limit)
        self._counts = np.zeros(self.num_positions, dtype=np.int32)
        self._is_said = np.zeros(self.num_positions, dtype=np.bool_)
        self.change(RowTraffic([], []))  # Compiling is not for a step to wait for.

    def change(self, traffic: RowTraffic) -> RowChanges:
        """Counts rows that came and rows that went since the last call; order does not matter.

        Raises:
            IntegrityError: more rows went than had come.
        """
        came, went = _joined(traffic.came), _joined(traffic.went)
        _add(came, 1, self._counts, self.num_rows)
        _add(went, -1, self._counts, self.num_rows)
        changed = np.empty(len(came) + len(went), dtype=np.uint32)
        number, came_sound = self._compare(came, changed, 0)
        number, went_sound = self._compare(went, changed, number)
        if not came_sound or not went_sound:
            raise IntegrityError("row digest: a row went that was not there")
        changed = np.sort(changed[:number])
        is_stored = self._is_said[changed]
        return RowChanges(changed[is_stored], changed[~is_stored])

    def _compare(self, rows: RowIds, changed: Positions, number: int) -> tuple[int, bool]:
        found: tuple[int, bool] = _compare(
            rows, self._counts, self._is_said, self.num_rows, changed, number
        )
        return found

    def resident(self) -> Positions:
        """All positions that hold a row, ascending, uint32 [n]."""
        return np.flatnonzero(self._is_said).astype(np.uint32)

    def snapshot_events(self) -> list[list[RowEvent]]:
        """All that is there, as the events of one or more batches; the first clears the rest."""
        resident = self.resident()
        parts = range(0, len(resident), _POSITIONS_PER_EVENT)
        stored = [pack_positions(resident[i : i + _POSITIONS_PER_EVENT]) for i in parts]
        batches: list[list[RowEvent]] = [[RowsCleared()]]
        batches += [[RowsStored(packed)] for packed in stored]
        return batches


def _joined(parts: RowParts) -> RowIds:
    """All rows, int64 [n], in the one layout that the kernels are compiled for."""
    joined: RowIds = np.concatenate([_NOTHING, *parts])
    return joined

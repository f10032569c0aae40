"""The one reader of the host tier: demand misses at once, refill in the background.

Refill goes chunk by chunk on a thread of its own: read from the host tier, copied to the device,
and only then the next one, whose turn comes when no demand miss is in progress (`LinkOrder`). A
demand miss waits for no refill, or on a single slow link for the rest of one chunk. Stores that
keep connections give each thread its own.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from block_manager.refill import HostTraffic, TrafficClass
from model_executor.exceptions import RowsUnavailableError
from model_executor.host_store import HostStore
from model_executor.link_order import LinkOrder

if TYPE_CHECKING:  # The simulated executor reads this file, and needs no torch.
    from model_executor.device_link import CarriedRows, DeviceLink, Land

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

CHUNK_ROWS = 64
CHUNK_BYTES = 256 << 10
"""A chunk ends at whichever comes first: 2 ms of a link of 1 Gbit/s, the most that a demand miss
behind it can be late, and 5 us of a PCIe 5 link."""


def refill_chunk_rows(row_bytes: int) -> int:
    """Rows of the largest chunk of a refill."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))


@dataclass(frozen=True, slots=True)
class LandedRows:
    """A part of a refill that is over, for better or worse."""

    row_ids: Int64Array
    """[n]"""
    rows: CarriedRows | None
    """They are on the device; None = they could not be had."""
    error: RowsUnavailableError | None = None
    """Why not."""


class RowLoader:
    """Owns a host store. `load`, `start_refill` and `take_landed` are for the step's thread."""

    def __init__(
        self, store: HostStore, row_bytes: int, link: DeviceLink, chunk_rows: int = CHUNK_ROWS
    ) -> None:
        """Takes the store, the bytes of one of its rows and the way to the device.

        No thread runs before a refill.
        """
        self.traffic = HostTraffic()
        """Bytes and failures by class; refill is counted when it is taken."""
        self._store = store
        self._link = link
        self._chunk_rows = min(chunk_rows, refill_chunk_rows(row_bytes))
        self._state = threading.Condition()
        # What follows is guarded by it.
        self._order = LinkOrder()
        self._waiting: deque[Int64Array] = deque()
        self._landed: list[LandedRows] = []
        self._closed = False
        self._thread: threading.Thread | None = None

    def forget_traffic(self) -> None:
        """Counts from 0 again: a warm-up is not to be seen."""
        self.traffic = HostTraffic()

    @property
    def device_bytes(self) -> int:
        """What the way to the device keeps there."""
        return self._link.device_bytes

    def load(self, row_ids: Int64Array, land: Land) -> None:
        """Reads rows that a running step needs (int64 [n]), copies and lands them.

        Raises:
            RowsUnavailableError: the rows cannot be had now; none was landed.
        """
        with self._state:
            self._order.ask(TrafficClass.DEMAND_MISS)
        try:
            rows = self._store.read_rows(row_ids)
            self._link.carry(TrafficClass.DEMAND_MISS, rows, land)
        except RowsUnavailableError:
            self.traffic.count_failure(TrafficClass.DEMAND_MISS)
            raise
        finally:
            with self._state:
                self._order.done(TrafficClass.DEMAND_MISS)
                self._state.notify_all()
        self.traffic.count(TrafficClass.DEMAND_MISS, rows.nbytes)

    @property
    def is_refilling(self) -> bool:
        """Whether rows of a refill have not landed yet."""
        with self._state:
            return self._has_refill

    @property
    def _has_refill(self) -> bool:
        return self._order.is_refilling or bool(self._waiting)

    def start_refill(self, row_ids: Int64Array) -> None:
        """Begins to read rows (int64 [n]) in the background, in this order.

        Every one of them lands once, with its values or with an error.

        Raises:
            RuntimeError: the refill before is not over, the loader is closed, or no thread can be
                started.
        """
        with self._state:
            if self._closed:
                raise RuntimeError("the loader is closed")
            if self._has_refill:
                raise RuntimeError("the refill before has not landed yet")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="refill", daemon=True)
                thread.start()
                self._thread = thread
            for first in range(0, len(row_ids), self._chunk_rows):
                self._waiting.append(row_ids[first : first + self._chunk_rows].copy())
            self._state.notify_all()

    def take_landed(self) -> list[LandedRows]:
        """What has landed since the last call, in the order it was asked for."""
        with self._state:
            landed, self._landed = self._landed, []
        for one in landed:
            if one.rows is not None:
                self.traffic.count(TrafficClass.REFILL, one.rows.nbytes)
            else:
                self.traffic.count_failure(TrafficClass.REFILL)
        return landed

    def close(self) -> None:
        """Ends the thread after the chunk that it reads; what has not been read never lands."""
        with self._state:
            self._closed = True
            self._waiting.clear()
            self._state.notify_all()
            thread = self._thread
        self._link.close()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._may_begin)
                if self._closed:
                    return
                row_ids = self._waiting.popleft()
                self._order.begin_refill_chunk()
            landed = self._read(row_ids)
            with self._state:
                self._landed.append(landed)
                if landed.error is not None and self._waiting:
                    # The rest would fail too, each after its own time-out.
                    rest = np.concatenate(list(self._waiting))
                    self._landed.append(LandedRows(rest, None, landed.error))
                    self._waiting.clear()
                self._order.end_refill_chunk()

    @property
    def _may_begin(self) -> bool:
        return bool(self._waiting) and self._order.may_begin(TrafficClass.REFILL)

    def _read(self, row_ids: Int64Array) -> LandedRows:
        try:
            return LandedRows(row_ids, self._link.carry_refill(self._store.read_rows(row_ids)))
        except RowsUnavailableError as error:
            return LandedRows(row_ids, None, error)
        except Exception as error:
            # Nobody asked for these rows: whatever it is, no request may fail of it.
            failure = RowsUnavailableError(f"refill failed: {error!r}")
            failure.__cause__ = error
            return LandedRows(row_ids, None, failure)

"""Rows on their way through two rings of pinned buffers, one for a step's misses, one for refill.

    host rows -> pinned buffer -> (stream of the class) -> device buffer -> (compute stream) -> pool

A buffer is used again when the work that landed its rows is done, which an event tells. Only the
last arrow writes to the pool, and it runs on the stream that computes: the order of steps, moves
and rows is that of one stream.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
from torch import Tensor

from block_manager.refill import TrafficClass
from model_executor.device_link import CarriedRows, Land
from model_executor.host_store import HOST_NUMBER_BYTES
from model_executor.row_loader import refill_chunk_rows
from model_executor.step import Float32Array

CHUNK_BYTES = 1 << 20
"""Of a step's misses: 20 us of a PCIe 5 link, a fifth of which it takes to begin a copy."""
NUM_BUFFERS = 8
"""Of misses: the host fills one while others are copied and landed."""
NUM_REFILL_BUFFERS = 4
"""Of refill: a chunk waits for the next step to land it."""


class DeviceEvent(Protocol):
    """A point of a stream."""

    def synchronize(self) -> None:
        """Returns when the stream has passed it."""
        ...


class CopyDevice(Protocol):
    """What the link needs of a device. But for allocations, all calls return at once."""

    def allocate(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Pinned host memory and device memory, float32 [rows, width] each."""
        ...

    def copy(self, traffic: TrafficClass, source: Tensor, target: Tensor) -> DeviceEvent:
        """Copies pinned rows to device rows on the stream of a class; the event ends it."""
        ...

    def hold_compute(self, event: DeviceEvent) -> None:
        """What is enqueued to compute from now on runs after the event."""
        ...

    def mark_compute(self) -> DeviceEvent:
        """The event that ends all that has been enqueued to compute."""
        ...


class _Buffer:
    """A place of a ring."""

    def __init__(self, device: CopyDevice, rows: int, width: int) -> None:
        self.host, self.device = device.allocate(rows, width)
        self._host_rows: Float32Array = self.host.numpy()
        self.landed: DeviceEvent | None = None
        """When it may be used again; None = it was never used."""

    def fill(self, rows: Float32Array) -> tuple[Tensor, Tensor]:
        """Copies rows in, once that is allowed; returns the parts of both sides that hold them."""
        if self.landed is not None:
            self.landed.synchronize()
        np.copyto(self._host_rows[: len(rows)], rows)
        return self.host[: len(rows)], self.device[: len(rows)]


class StagedLink:
    """See `DeviceLink`."""

    def __init__(self, device: CopyDevice, row_width: int) -> None:
        """Allocates both rings for rows of this many float32 numbers."""
        row_bytes = HOST_NUMBER_BYTES * row_width
        self._device = device
        self._chunk_rows = max(1, CHUNK_BYTES // row_bytes)
        self._ring = [_Buffer(device, self._chunk_rows, row_width) for _ in range(NUM_BUFFERS)]
        self._next = 0
        refill_rows = refill_chunk_rows(row_bytes)
        # Their order does not matter, only who holds them.
        self._refill_ring = [
            _Buffer(device, refill_rows, row_width) for _ in range(NUM_REFILL_BUFFERS)
        ]
        self._state = threading.Condition()
        self._free = list(self._refill_ring)
        self._is_closed = False

    @property
    def device_bytes(self) -> int:
        """What both rings keep on the device."""
        return sum(buffer.device.nbytes for buffer in (*self._ring, *self._refill_ring))

    def carry(self, traffic: TrafficClass, rows: Float32Array, land: Land) -> None:
        """See `DeviceLink.carry`."""
        for first in range(0, len(rows), self._chunk_rows):
            buffer = self._ring[self._next]
            self._next = (self._next + 1) % len(self._ring)
            pinned, target = buffer.fill(rows[first : first + self._chunk_rows])
            copied = self._device.copy(traffic, pinned, target)
            self._device.hold_compute(copied)
            # Also when `land` fails: what it enqueued may still run.
            try:
                land(first, target)
            finally:
                buffer.landed = self._device.mark_compute()

    def carry_refill(self, rows: Float32Array) -> CarriedRows:
        """See `DeviceLink.carry_refill`."""
        with self._state:
            self._state.wait_for(lambda: self._free or self._is_closed)
            if self._is_closed:
                raise RuntimeError("the link is closed")
            buffer = self._free.pop()
        try:
            pinned, target = buffer.fill(rows)
            copied = self._device.copy(TrafficClass.REFILL, pinned, target)
            # Its thread waits, so that the next chunk is begun only when this one is over.
            copied.synchronize()
        except BaseException:
            self._give_back(buffer)
            raise
        return _Carried(self, buffer, target)

    def close(self) -> None:
        """See `DeviceLink.close`."""
        with self._state:
            self._is_closed = True
            self._state.notify_all()

    def land(self, buffer: _Buffer, rows: Tensor, land: Land) -> None:
        """See `CarriedRows.land`; the copy is over, so that there is nothing to wait for."""
        try:
            land(0, rows)
        finally:
            buffer.landed = self._device.mark_compute()
            self._give_back(buffer)

    def _give_back(self, buffer: _Buffer) -> None:
        with self._state:
            self._free.append(buffer)
            self._state.notify_all()


class _Carried:
    """See `CarriedRows`."""

    def __init__(self, link: StagedLink, buffer: _Buffer, rows: Tensor) -> None:
        self._link, self._buffer, self._rows = link, buffer, rows
        self.nbytes = rows.nbytes

    def land(self, land: Land) -> None:
        """See `CarriedRows.land`."""
        self._link.land(self._buffer, self._rows, land)

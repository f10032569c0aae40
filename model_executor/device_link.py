"""The way of rows from host memory to where the device reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from block_manager.refill import TrafficClass
from model_executor.step import Float32Array

Land = Callable[[int, Tensor], None]
"""Takes the place of the first row of a chunk, and the chunk: float32 [n, D] on the device. It may
only enqueue work on the chunk, which is overwritten when that work is done."""


class CarriedRows(Protocol):
    """A chunk of a refill that is on the device, but not yet where it belongs."""

    @property
    def nbytes(self) -> int:
        """Bytes that came over the link."""
        ...

    def land(self, land: Land) -> None:
        """Lets the chunk be written to its places and gives it up; once, by the step's thread."""
        ...


class DeviceLink(Protocol):
    """Copies rows to the device."""

    @property
    def device_bytes(self) -> int:
        """What it keeps on the device."""
        ...

    def carry(self, traffic: TrafficClass, rows: Float32Array, land: Land) -> None:
        """Copies rows [n, D] that a step waits for, and lands them chunk by chunk, in order.

        What `land` enqueues runs after the chunk's copy. For the step's thread.
        """
        ...

    def carry_refill(self, rows: Float32Array) -> CarriedRows:
        """Copies a chunk of a refill, [n, D]; returns when it is on the device.

        For the refill's thread. It waits while earlier chunks have not been landed.

        Raises:
            RuntimeError: the link was closed.
        """
        ...

    def close(self) -> None:
        """Wakes who waits; nothing is carried afterwards."""
        ...


class _HostRows:
    def __init__(self, rows: Float32Array) -> None:
        self._rows = torch.from_numpy(rows)
        self.nbytes = rows.nbytes

    def land(self, land: Land) -> None:
        """See `CarriedRows.land`."""
        land(0, self._rows)


class SharedMemoryLink:
    """Of a device that reads host memory: nothing is copied."""

    device_bytes = 0

    def carry(self, traffic: TrafficClass, rows: Float32Array, land: Land) -> None:
        """See `DeviceLink.carry`."""
        land(0, torch.from_numpy(rows))

    def carry_refill(self, rows: Float32Array) -> CarriedRows:
        """See `DeviceLink.carry_refill`."""
        return _HostRows(rows)

    def close(self) -> None:
        """See `DeviceLink.close`."""


def device_link(device: torch.device, row_width: int) -> DeviceLink:
    """The link to a device for rows of this many numbers."""
    if device.type == "cpu":
        return SharedMemoryLink()
    from model_executor.cuda_copies import CudaCopies
    from model_executor.staged_link import StagedLink

    return StagedLink(CudaCopies(device), row_width)

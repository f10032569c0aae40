"""Copies to a CUDA device: one stream for each traffic class, the more urgent the higher."""

from __future__ import annotations

import torch
from torch import Tensor

from block_manager.refill import TrafficClass
from model_executor.staged_link import DeviceEvent


class CudaCopies:
    """See `CopyDevice`. A step computes on the stream that is current in its thread."""

    def __init__(self, device: torch.device) -> None:
        """Makes the streams."""
        self._device = device
        with torch.cuda.device(device):
            # A static method, whatever torch's annotations say.
            least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
            levels = (greatest, (greatest + least) // 2, least)
            self._streams = {
                traffic: torch.cuda.Stream(device, priority=level)
                for traffic, level in zip(TrafficClass, levels, strict=True)
            }

    def allocate(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """See `CopyDevice.allocate`."""
        pinned = torch.empty(rows, width, dtype=torch.float32, pin_memory=True)
        return pinned, torch.empty(rows, width, dtype=torch.float32, device=self._device)

    def copy(self, traffic: TrafficClass, source: Tensor, target: Tensor) -> DeviceEvent:
        """See `CopyDevice.copy`."""
        with torch.cuda.stream(self._streams[traffic]):
            target.copy_(source, non_blocking=True)
            # Who waits sleeps: a spinning thread would take the processor from the step's.
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        return copied

    def hold_compute(self, event: DeviceEvent) -> None:
        """See `CopyDevice.hold_compute`."""
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark_compute(self) -> DeviceEvent:
        """See `CopyDevice.mark_compute`."""
        landed = torch.cuda.Event(blocking=True)
        landed.record(torch.cuda.current_stream(self._device))
        return landed

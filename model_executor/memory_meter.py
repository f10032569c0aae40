"""What a device holds, what a step adds to it, and how a lack of memory is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from model_executor.device_budget import as_size
from model_executor.exceptions import DeviceMemoryError
from model_executor.executor import Executor
from model_executor.step import SchedulerOutput


class MemoryMeter(Protocol):
    """Measures how much more memory is held at once than at a beginning."""

    def begin(self) -> None:
        """Counts from what is held now."""
        ...

    def most_added(self) -> int:
        """The most bytes beyond that which were held at any time since."""
        ...


class CudaMemoryMeter:
    """Of a GPU: bytes of tensors, as torch's allocator hands them out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0

    def begin(self) -> None:
        """See `MemoryMeter.begin`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._held = torch.cuda.memory_allocated(self._device)

    def most_added(self) -> int:
        """See `MemoryMeter.most_added`."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._held


def measure_workspace(
    executor: Executor, steps: Iterable[SchedulerOutput], meter: MemoryMeter
) -> int:
    """Carries out steps; the most bytes that they hold beside what was held before.

    What libraries keep from the first step on (workspaces of matrix products) counts too.

    Raises:
        RowsUnavailableError: the host tier could not deliver rows.
    """
    meter.begin()
    for step in steps:
        executor.execute(step)
    return meter.most_added()


@contextmanager
def memory_errors_told(device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Tells a lack of the device's memory as the operator's: how much is free, what to lower.

    Args:
        device: whose memory.
        what: there was no room for it.
        advice: what to do.

    Raises:
        DeviceMemoryError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"device: {device} has no room for {what}{free_of(device)}; {advice}"
        ) from error


def free_of(device: torch.device) -> str:
    """What is to be said of a GPU's memory, after a colon."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f": {as_size(free)} of {as_size(total)} are free"

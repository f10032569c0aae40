"""A device whose streams do their work as late as they may, and write down what they did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from block_manager.refill import TrafficClass
from model_executor.staged_link import DeviceEvent


class FakeStream:
    """Work in the order in which it was enqueued."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.num_done = 0

    def run_until(self, number: int) -> None:
        while self.num_done < number:
            place, self.num_done = self.num_done, self.num_done + 1
            self.work[place]()


@dataclass
class FakeEvent:
    lock: threading.RLock
    stream: FakeStream
    number: int

    def synchronize(self) -> None:
        with self.lock:
            self.stream.run_until(self.number)


@dataclass
class FakeCopies:
    """See `CopyDevice`. Nothing is copied before somebody waits for it."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    log: list[TrafficClass] = field(default_factory=list)
    streams: dict[TrafficClass, FakeStream] = field(
        default_factory=lambda: {traffic: FakeStream() for traffic in TrafficClass}
    )
    compute: FakeStream = field(default_factory=FakeStream)

    def allocate(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        return torch.full((rows, width), torch.nan), torch.full((rows, width), torch.nan)

    def copy(self, traffic: TrafficClass, source: Tensor, target: Tensor) -> FakeEvent:
        with self.lock:
            self.log.append(traffic)
            stream = self.streams[traffic]

            def move() -> None:
                target.copy_(source)

            stream.work.append(move)
            return FakeEvent(self.lock, stream, len(stream.work))

    def hold_compute(self, event: DeviceEvent) -> None:
        self.enqueue(event.synchronize)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Enqueues work to compute."""
        with self.lock:
            self.compute.work.append(work)

    def mark_compute(self) -> FakeEvent:
        with self.lock:
            return FakeEvent(self.lock, self.compute, len(self.compute.work))

    def run_some(self, number: int) -> None:
        """Does what is enqueued to compute, up to a piece of work."""
        with self.lock:
            self.compute.run_until(min(number, len(self.compute.work)))

    def run_all(self) -> None:
        """Does all that is enqueued."""
        self.run_some(len(self.compute.work))

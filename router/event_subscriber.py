"""Follows the events of one engine and hands them on in sequence. (Shape of the interface.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from block_manager.events import KVEventBatch, RowEventBatch


class ResidencySink(Protocol):
    """What takes the events of named engines; `Residency` is one."""

    def apply_kv(self, name: str, batch: KVEventBatch) -> None:
        """Blocks that became reusable on an engine, and blocks that went, in order."""
        ...

    def apply_rows(self, name: str, batch: RowEventBatch) -> None:
        """Positions of the engine's row digest that changed."""
        ...

    def forget(self, name: str) -> None:
        """Nothing is known of the engine any more; events of all it holds may follow."""
        ...


class EventSubscriber:
    """Reads an engine's events on a thread of its own; `deliver` hands them to the sink."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        replay_endpoint: str | None,
        sink: ResidencySink,
        wake: Callable[[], None] | None = None,
    ) -> None:
        """Begins to listen; an engine that is not there yet is waited for.

        Args:
            name: of the engine, as the sink knows it.
            endpoint: ZeroMQ address that the engine publishes on.
            replay_endpoint: that it repeats batches and gives snapshots on; None = nowhere.
            sink: is called by `deliver` only, on the caller's thread.
            wake: called on the subscriber's thread when there is something to deliver, for
                instance `lambda: loop.call_soon_threadsafe(subscriber.deliver)`.
        """

    def deliver(self, limit: int | None = None) -> int:
        """Hands what came to the sink, oldest first; returns how many batches that were.

        Args:
            limit: batches at most; None = all that are there.
        """
        raise NotImplementedError

    def resync(self) -> None:
        """Asks for everything anew, for instance after the engine was forgotten elsewhere."""

    def close(self) -> None:
        """Ends the thread; nothing is delivered after it."""

"""What engines hold according to their events, kept in the plainest way; and waiting for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from threading import Lock

from block_manager.events import (
    BlockRemoved,
    BlockStored,
    ExternalBlockHash,
    KVEventBatch,
    RowEventBatch,
    RowsRemoved,
    RowsStored,
)
from block_manager.row_digest import unpack_positions

GIVE_UP_SECONDS = 60.0
"""No test asserts a time: this is when a test that hangs ends."""


def wait_until(is_so: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + GIVE_UP_SECONDS
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        meanwhile()
        time.sleep(0.002)


class Holdings:
    """A sink: each engine's blocks, as often as it holds them, and its row positions."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks: dict[str, Counter[ExternalBlockHash]] = {}
        self._positions: dict[str, set[int]] = {}
        self.batches: list[KVEventBatch | RowEventBatch] = []
        self.num_forgotten = 0

    def blocks(self, name: str) -> Counter[ExternalBlockHash]:
        with self._lock:
            return Counter(self._blocks.get(name, Counter()))

    def positions(self, name: str) -> set[int]:
        with self._lock:
            return set(self._positions.get(name, set()))

    def apply_kv(self, name: str, batch: KVEventBatch) -> None:
        with self._lock:
            self.batches.append(batch)
            blocks = self._blocks.setdefault(name, Counter())
            for event in batch.events:
                if isinstance(event, BlockStored):
                    blocks.update(event.block_hashes)
                elif isinstance(event, BlockRemoved):
                    # What is not known to be there was stored before we listened.
                    for block_hash in event.block_hashes:
                        blocks[block_hash] -= 1
                    self._blocks[name] = blocks = +blocks
                else:
                    blocks.clear()

    def apply_rows(self, name: str, batch: RowEventBatch) -> None:
        with self._lock:
            self.batches.append(batch)
            positions = self._positions.setdefault(name, set())
            for event in batch.events:
                if isinstance(event, RowsStored):
                    positions.update(unpack_positions(event.positions).tolist())
                elif isinstance(event, RowsRemoved):
                    positions.difference_update(unpack_positions(event.positions).tolist())
                else:
                    positions.clear()

    def forget(self, name: str) -> None:
        with self._lock:
            self.num_forgotten += 1
            self._blocks.pop(name, None)
            self._positions.pop(name, None)

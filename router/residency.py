"""What every engine holds, KV blocks and rows, kept by the events that engines send.

Batches of one engine must come in the order in which the engine sent them; lost ones are the
subscriber's to notice, and then it calls `forget`. Events may be taken in on one thread while
another routes: a lock keeps them apart, for one event at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from threading import Lock

import numpy as np

from block_manager.events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ExternalBlockHash,
    KVEventBatch,
    RowEventBatch,
    RowsCleared,
    RowsStored,
)
from router.cost import Int64Array
from router.engine_slots import EngineSlots
from router.prefix_index import PrefixIndex, hash_keys
from router.row_index import RowIndex

_FIRST_GROUP = (None, 0)


class Residency:
    """Both indexes of a fleet; engines by name, arrays over engines by slot."""

    def __init__(self, slots: EngineSlots | None = None) -> None:
        """Takes the slots, if others index by them too."""
        self.slots = EngineSlots() if slots is None else slots
        self._lock = Lock()
        self._prefixes = PrefixIndex()
        self._rows = RowIndex()
        self._num_positions: dict[str, int] = {}

    def add_engine(self, name: str, num_rows: int, num_positions: int) -> None:
        """Takes in an engine of which nothing is known yet, or forgets what was.

        Args:
            name: as its batches will be called.
            num_rows: of the catalogue.
            num_positions: of the engine's row digest; 0 = it sends none.

        Raises:
            ValueError: engines with row digests have other sizes.
        """
        with self._lock:
            sizes = self._rows.num_rows, self._rows.num_positions
            if num_positions and any(self._num_positions.values()):
                for what, mine, others in zip(
                    ("num_rows", "num_positions"), (num_rows, num_positions), sizes, strict=True
                ):
                    if mine != others:
                        raise ValueError(
                            f"{what}: {name} has {mine}, the engines before it have {others}"
                        )
            slot = self.slots.add(name)
            self._prefixes.add_slot(slot)
            self._rows.add_slot(slot)
            if num_positions and sizes != (num_rows, num_positions):
                self._rows.set_size(num_rows, num_positions)
            self._num_positions[name] = num_positions
            self._clear(slot)

    def remove_engine(self, name: str) -> None:
        """The engine has left; its late batches are passed over."""
        self.forget(name)
        self._num_positions.pop(name, None)

    def forget(self, name: str) -> None:
        """Nothing of what is known of an engine holds any more; an unknown one is passed over."""
        with self._lock:
            if name in self._num_positions:
                self._clear(self.slots[name])

    def _clear(self, slot: int) -> None:
        self._prefixes.clear(slot)
        self._rows.clear(slot)

    # ---------------------------------------------------------------- events

    def apply_kv(self, name: str, batch: KVEventBatch) -> None:
        """Takes in what happened to an engine's KV; a batch of an unknown engine is passed over.

        Content in other memory than the device's does not count, nor do groups of layers beyond
        the first: a history's groups come and go together.
        """
        # Events of one kind in a row are one: some engines report every removed block by itself.
        for kind, events in itertools.groupby(batch.events, type):
            hashes: list[ExternalBlockHash] = []
            for event in events:
                if isinstance(event, AllBlocksCleared):
                    continue
                if event.medium in (None, MEDIUM_GPU) and event.group_idx in _FIRST_GROUP:
                    hashes += event.block_hashes
            keys = hash_keys(hashes)
            with self._lock:
                if name not in self._num_positions:
                    return
                slot = self.slots[name]
                if kind is BlockStored:
                    self._prefixes.store(slot, keys)
                elif kind is BlockRemoved:
                    self._prefixes.remove(slot, keys)
                else:
                    self._prefixes.clear(slot)

    def apply_rows(self, name: str, batch: RowEventBatch) -> None:
        """Takes in what happened to an engine's rows; a batch of an unknown engine is passed over.

        Raises:
            ValueError: the digest has another size than the engine was added with, or a position
                is beyond it; nothing of that event and of those after it is taken in.
        """
        for event in batch.events:
            with self._lock:
                if name not in self._num_positions:
                    return
                if batch.num_positions != self._num_positions[name]:
                    raise ValueError(
                        f"num_positions: {name} has {self._num_positions[name]}, "
                        f"not {batch.num_positions}"
                    )
                slot = self.slots[name]
                if isinstance(event, RowsCleared):
                    self._rows.clear(slot)
                    continue
                positions = _unpacked(event.positions, batch.num_positions)
                if isinstance(event, RowsStored):
                    self._rows.store(slot, positions)
                else:
                    self._rows.remove(slot, positions)

    # ---------------------------------------------------------------- questions

    def cached_blocks(self, hashes: Sequence[ExternalBlockHash]) -> Int64Array:
        """Leading blocks of a history that each engine holds without a gap: int64 [E]."""
        return self.cached_blocks_of_keys(hash_keys(hashes))

    def cached_blocks_of_keys(self, keys: Int64Array) -> Int64Array:
        """Likewise of hashes that went through `hash_keys`, int64 [n]."""
        with self._lock:
            return self._prefixes.prefix_blocks(keys, len(self.slots))

    def rows_missing(
        self,
        rows: Int64Array,
        candidate_rows: Int64Array,
        cached_tokens: Int64Array,
        is_known: bool = True,
    ) -> Int64Array:
        """Distinct rows that each engine needs and does not hold, see `RowIndex.missing`."""
        with self._lock:
            return self._rows.missing(rows, candidate_rows, cached_tokens, is_known)

    def num_blocks(self, name: str) -> int:
        """Distinct KV blocks that an engine holds; raises KeyError for an unknown name."""
        with self._lock:
            return self._prefixes.count(self.slots[name])

    def num_row_positions(self, name: str) -> int:
        """Positions at which an engine holds a row; raises KeyError for an unknown name."""
        with self._lock:
            return self._rows.count(self.slots[name])


def _unpacked(positions: bytes, num_positions: int) -> Int64Array:
    """Positions of a row event, int64 [n]."""
    if len(positions) % 4:
        raise ValueError(f"positions: {len(positions)} bytes are not a multiple of 4")
    unpacked = np.frombuffer(positions, dtype="<u4").astype(np.int64)
    if len(unpacked) and unpacked.max() >= num_positions:
        raise ValueError(f"positions: {unpacked.max()} is beyond the last of {num_positions}")
    return unpacked

"""What engines hold, the slow way: a count for each hash and a set of positions for each engine."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from block_manager.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    RowEventBatch,
    RowsCleared,
    RowsStored,
)
from block_manager.row_digest import position_of_rows


def low_64_bits(block_hash: bytes | int) -> int:
    number = block_hash if isinstance(block_hash, int) else int.from_bytes(block_hash, "big")
    return number % 2**64


class PlainResidency:
    def __init__(self, num_rows: int, num_positions: int) -> None:
        self.sizes = num_rows, num_positions
        self.blocks: dict[str, Counter[int]] = defaultdict(Counter)
        self.positions: dict[str, set[int]] = defaultdict(set)

    def forget(self, name: str) -> None:
        self.blocks[name].clear()
        self.positions[name].clear()

    def apply_kv(self, name: str, batch: KVEventBatch) -> None:
        held = self.blocks[name]
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                held.clear()
                continue
            if event.medium not in (None, "GPU"):
                continue
            for one in event.block_hashes:
                key = low_64_bits(one)
                if isinstance(event, BlockStored):
                    held[key] += 1
                elif isinstance(event, BlockRemoved) and held[key]:
                    held[key] -= 1

    def apply_rows(self, name: str, batch: RowEventBatch) -> None:
        held = self.positions[name]
        for event in batch.events:
            if isinstance(event, RowsCleared):
                held.clear()
                continue
            positions = set(np.frombuffer(event.positions, dtype="<u4").tolist())
            if isinstance(event, RowsStored):
                held |= positions
            else:
                held -= positions

    def cached_blocks(self, name: str, hashes: Sequence[bytes | int]) -> int:
        for number, one in enumerate(hashes):
            if not self.blocks[name][low_64_bits(one)]:
                return number
        return len(hashes)

    def rows_missing(
        self, name: str, rows: list[int], candidate_rows: list[int], cached_tokens: int
    ) -> int:
        needed = {row for row in rows[cached_tokens:] + candidate_rows if row >= 0}
        places = position_of_rows(np.array(sorted(needed), dtype=np.int64), *self.sizes)
        return sum(place not in self.positions[name] for place in places.tolist())

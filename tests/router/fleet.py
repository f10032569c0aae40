"""Small fleets, and requests and events for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from block_manager.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ExternalBlockHash,
    KVEventBatch,
    RowEventBatch,
    RowsCleared,
    RowsRemoved,
    RowsStored,
)
from router.cost import EngineCosts, Work
from router.dispatcher import Dispatcher

BLOCK_TOKENS = 4
NUM_ROWS = 1000
COSTS = EngineCosts(
    step_ms=1.0,
    request_ms=0.1,
    prefill_row_ms=0.25,
    attention_pair_ms=0.001,
    candidate_ms=0.01,
    candidate_pair_ms=0.0001,
    row_miss_ms=0.05,
    round_trip_ms=0.5,
)


def history(user: int, num_blocks: int) -> list[bytes]:
    """Hashes of a user's blocks, each over all before it."""
    running = hashlib.sha256(str(user).encode())
    hashes = []
    for number in range(num_blocks):
        running.update(str(number).encode())
        hashes.append(running.digest())
    return hashes


def work_of(
    user: int, num_blocks: int = 5, *, rows: Sequence[int] = (), candidates: Sequence[int] = ()
) -> Work:
    """A user's request; by default the tokens take the rows after 10 x user."""
    num_tokens = num_blocks * BLOCK_TOKENS
    if not rows:
        rows = [(10 * user + number) % NUM_ROWS for number in range(num_tokens)]
    return Work(
        history(user, num_blocks),
        BLOCK_TOKENS,
        num_tokens,
        np.array(rows, dtype=np.int64),
        np.array(candidates, dtype=np.int64),
        user_tag=int.from_bytes(hashlib.blake2b(str(user).encode(), digest_size=7).digest()) + 1,
    )


def fleet(
    *names: str, policy: str = "joint", seed: int = 0, expected_for_s: float = 2.0
) -> Dispatcher:
    dispatcher = Dispatcher(policy, seed, expected_for_s=expected_for_s)
    for name in names:
        dispatcher.add_engine(name, COSTS, num_rows=NUM_ROWS, num_positions=NUM_ROWS)
    return dispatcher


def stored(*hashes: ExternalBlockHash, medium: str | None = "GPU") -> BlockStored:
    tokens = [0] * len(hashes) * BLOCK_TOKENS
    return BlockStored(list(hashes), None, tokens, BLOCK_TOKENS, None, medium, None)


def removed(*hashes: ExternalBlockHash, medium: str | None = "GPU") -> BlockRemoved:
    return BlockRemoved(list(hashes), medium)


def kv_batch(*events: BlockStored | BlockRemoved | AllBlocksCleared) -> KVEventBatch:
    return KVEventBatch(0.0, list(events))


def packed(positions: Sequence[int]) -> bytes:
    return np.array(sorted(set(positions)), dtype="<u4").tobytes()


def rows_stored(*positions: int) -> RowsStored:
    return RowsStored(packed(positions))


def rows_removed(*positions: int) -> RowsRemoved:
    return RowsRemoved(packed(positions))


def row_batch(
    *events: RowsStored | RowsRemoved | RowsCleared, num_positions: int = NUM_ROWS
) -> RowEventBatch:
    return RowEventBatch(0.0, list(events), num_positions)

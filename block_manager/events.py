"""What an engine holds, as messages for those who route by it.

Reusable KV in vLLM 0.32's wire format: a batch is a msgpack array `[ts, events,
data_parallel_rank]`, and each event in it a map with its name under "type" (vLLM's
distributed/kv_events.py). Fields that say nothing are left out, and whoever reads must pass over
fields it does not know. The same content may be stored by several blocks: each of them is reported,
and each again when it goes.

Embedding rows likewise, in batches of their own: which positions of a digest
(`block_manager.row_digest`) hold a row from now on, and which no longer.
"""

from __future__ import annotations

from typing import Any

import msgspec

ExternalBlockHash = bytes | int
"""A block's hash as others see it: all its bytes, or its low 64 bits."""

ExtraKeys = list[tuple[Any, ...] | None]
"""For each block what its hash covers besides its tokens; None where there is nothing."""

MEDIUM_GPU = "GPU"


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """One event; on the wire its "type" is the name of its class."""


class BlockStored(KVCacheEvent):
    """Content can be reused from now on, or was just reused."""

    block_hashes: list[ExternalBlockHash]
    """One for each block, in the order of the tokens."""
    parent_block_hash: ExternalBlockHash | None
    """Of the block before the first one, None where the history begins."""
    token_ids: list[int]
    """Of all blocks together."""
    block_size: int
    """Tokens of each block."""
    lora_id: int | None
    medium: str | None
    """Where the content is: "GPU", "CPU" or "STORAGE"."""
    lora_name: str | None
    extra_keys: ExtraKeys | None = None
    group_idx: int | None = None
    """The group of layers whose KV it is."""
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    """Of the request that stored or reused the content."""


class BlockRemoved(KVCacheEvent):
    """One block of that content is gone."""

    block_hashes: list[ExternalBlockHash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    """Nothing can be reused any more."""


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """Events in the order in which they happened."""

    ts: float
    """Seconds since the epoch."""
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class RowDigestEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """One event of the row digest; on the wire its "type" is the name of its class."""


class RowsStored(RowDigestEvent):
    """Positions of the digest hold a row from now on that held none."""

    positions: bytes
    """Little-endian uint32, ascending, distinct."""


class RowsRemoved(RowDigestEvent):
    """Positions that held a row hold none from now on."""

    positions: bytes
    """Likewise."""


class RowsCleared(RowDigestEvent):
    """No position holds a row any more."""


class RowEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """Changes of the row digest, in the order in which they happened."""

    ts: float
    """Seconds since the epoch."""
    events: list[RowsStored | RowsRemoved | RowsCleared]
    num_positions: int
    """Of the digest; every position is below it."""
    data_parallel_rank: int | None = None


# ---------------------------------------------------------------- asking for what was missed

SEQUENCE_BYTES = 8
"""Of a batch's number, big-endian; batches of a topic are counted from 0."""
NO_SEQUENCE = -1
"""Number of the message that ends an answer; its topic and payload are empty."""
SNAPSHOT_REQUEST = b"snapshot"
"""Sent in place of a first number; as a number it is one that no engine reaches, so an engine
that gives no snapshots answers with nothing."""
ROWS_REQUEST = b"rows"
"""Sent behind a first number: batches of the row digest are meant, and not those of KV."""


def kv_topic(engine: str, model: str) -> str:
    """What batches of an engine's KV are published under."""
    return f"kv@{engine}@{model}"


def rows_topic(engine: str, model: str) -> str:
    """What batches of an engine's row digest are published under."""
    return f"{ROWS_TOPIC}{engine}@{model}"


ROWS_TOPIC = "rows@"
"""What topics of row digests begin with."""

"""The events as bytes: what a consumer of vLLM's events reads."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from block_manager.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

STORED = BlockStored(
    block_hashes=[b"\1" * 32],
    parent_block_hash=None,
    token_ids=[7, 8],
    block_size=2,
    lora_id=None,
    medium="GPU",
    lora_name=None,
)


def decoded(value: Any) -> Any:
    """As a consumer without our classes reads it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


def test_batch_is_an_array_of_time_events_and_rank() -> None:
    batch = KVEventBatch(ts=12.5, events=[AllBlocksCleared()])
    assert msgspec.msgpack.encode(batch) == (
        b"\x93"  # an array of three
        b"\xcb\x40\x29\x00\x00\x00\x00\x00\x00"  # 12.5
        b"\x91\x81\xa4type\xb0AllBlocksCleared"  # a list of one map, which names its class
        b"\xc0"  # no rank
    )


def test_stored_blocks_always_say_what_vllm_always_says() -> None:
    assert decoded(STORED) == {
        "type": "BlockStored",
        "block_hashes": [b"\1" * 32],
        "parent_block_hash": None,
        "token_ids": [7, 8],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra_keys", [["salt"]]),
        ("group_idx", 1),
        ("kv_cache_spec_kind", "full_attention"),
        ("kv_cache_spec_sliding_window", 128),
        ("locality", "LOCAL"),
        ("ownership", "tier"),
        ("session_id", "s"),
    ],
)
def test_what_is_known_of_stored_blocks_is_added(field: str, value: Any) -> None:
    assert decoded(msgspec.structs.replace(STORED, **{field: value}))[field] == value


def test_removed_blocks_say_which_and_where() -> None:
    removed = BlockRemoved(block_hashes=[5], medium="GPU", group_idx=2)
    assert decoded(removed) == {
        "type": "BlockRemoved",
        "block_hashes": [5],
        "medium": "GPU",
        "group_idx": 2,
    }


def test_batch_is_read_back_with_its_classes() -> None:
    batch = KVEventBatch(ts=1.0, events=[STORED, BlockRemoved([b"x"], "GPU"), AllBlocksCleared()])
    wire = msgspec.msgpack.encode(batch)
    assert msgspec.msgpack.decode(wire, type=KVEventBatch) == batch


def test_fields_of_later_versions_are_passed_over() -> None:
    newer = [1.0, [{"type": "AllBlocksCleared", "since": 3}], None, "more"]
    wire = msgspec.msgpack.encode(newer)
    batch = msgspec.msgpack.decode(wire, type=KVEventBatch)
    assert batch == KVEventBatch(ts=1.0, events=[AllBlocksCleared()])

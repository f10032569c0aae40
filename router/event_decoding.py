"""Batches of events from their bytes, also those of other versions of vLLM.

vLLM 0.32 writes an event as a map with its name under "type"; before 0.10 it was an array of the
name and the fields in order. Fields that are missing, further fields and further events must not
keep a router from reading the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from block_manager.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    RowEventBatch,
)

logger = logging.getLogger(__name__)

_KV = msgspec.msgpack.Decoder(KVEventBatch)
_ROWS = msgspec.msgpack.Decoder(RowEventBatch)
_KINDS = {kind.__name__: kind for kind in (BlockStored, BlockRemoved, AllBlocksCleared)}
_READ = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "medium", "group_idx")
"""What a router may want to know; other fields may change their types as they like."""
_ALWAYS_THERE: dict[str, dict[str, Any]] = {
    "BlockStored": {
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": 0,
        "lora_id": None,
        "medium": None,
        "lora_name": None,
    },
    "BlockRemoved": {"medium": None},
    "AllBlocksCleared": {},
}
"""Fields of 0.32 that older events may lack."""


def decode_rows(payload: bytes) -> RowEventBatch:
    """A batch of the row digest's changes.

    Raises:
        ValueError: it is none.
    """
    with _limited_depth():
        return _ROWS.decode(payload)


def decode_kv(payload: bytes) -> KVEventBatch:
    """A batch of KV events; events of unknown kinds are left out.

    Raises:
        ValueError: it is none.
    """
    with _limited_depth():
        try:
            return _KV.decode(payload)
        except msgspec.ValidationError:
            return _decode_foreign(payload)


@contextmanager
def _limited_depth() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError("events: too many arrays or maps in each other") from error


def _decode_foreign(payload: bytes) -> KVEventBatch:
    batch = msgspec.msgpack.decode(payload)
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise ValueError("events: a batch must be an array of a time and an array of events")
    events = [_plain_event(event) for event in batch[1]]
    rank = batch[2] if len(batch) > 2 else None
    return msgspec.convert(
        [batch[0], [event for event in events if event is not None], rank], KVEventBatch
    )


def _plain_event(event: Any) -> dict[str, Any] | None:
    """An event as 0.32 writes it; None = of an unknown kind."""
    if isinstance(event, dict):
        kind, fields = _name(event.get("type")), event
    elif isinstance(event, list) and event:
        kind = _name(event[0])
        names = _KINDS[kind].__struct_fields__ if kind in _KINDS else ()
        fields = dict(zip(names, event[1:], strict=False))
    else:
        raise ValueError("events: an event must be a map or an array")
    if kind not in _KINDS:
        logger.debug("an event of kind %r is passed over", kind)
        return None
    known = {name: fields[name] for name in _READ if name in fields}
    return {"type": kind, **_ALWAYS_THERE[kind], **known}


def _name(kind: Any) -> str:
    if not isinstance(kind, str):
        raise ValueError("events: the kind of an event must be a string")
    return kind

"""vLLM's own classes, as our pool takes them at construction."""

from __future__ import annotations

from typing import Any

from vllm.distributed import kv_events
from vllm.v1.core import kv_cache_utils

from block_manager.events import ExtraKeys
from block_manager.vllm_block_pool import HostTypes, Spans


def extra_keys(request: Any, spans: Spans) -> ExtraKeys | None:
    """What vLLM's hashes of a request's blocks cover besides tokens, as its events say it."""
    found, mm_index = [], 0
    for start, end in spans:
        keys, mm_index = kv_cache_utils.generate_block_hash_extra_keys(
            request, start, end, mm_index
        )
        found.append(keys)
    converted: ExtraKeys | None = kv_cache_utils.to_event_extra_keys(found)
    return converted


VLLM_TYPES = HostTypes(
    block=kv_cache_utils.KVCacheBlock,
    block_stored=kv_events.BlockStored,
    block_removed=kv_events.BlockRemoved,
    all_blocks_cleared=kv_events.AllBlocksCleared,
    extra_keys=extra_keys,
    external_hash=kv_cache_utils.maybe_convert_block_hash,
)

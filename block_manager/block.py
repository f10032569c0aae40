"""A KV block: one page of the pool while the KV tenant holds it."""

from __future__ import annotations

from dataclasses import dataclass

from block_manager.block_hash import BlockHash


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """Bookkeeping of one block. The free list links blocks through the two last fields."""

    block_id: int
    """The block's page."""
    ref_cnt: int = 0
    """Running requests that read or write the block."""
    block_hash: BlockHash | None = None
    """Set while the block is full and its content can be reused."""
    is_null: bool = False
    prev_free_block: KVCacheBlock | None = None
    next_free_block: KVCacheBlock | None = None

"""The block pool with the methods and objects of vLLM 0.32's `BlockPool` (v1/core/block_pool.py).

A face on the books of `BlockPool`, which the engine runs on arrays: counts, free list and content
index are theirs, and every method here turns block objects into ids and ids into objects. It knows
what the books need not know: requests, events, metrics, and who asked to be told of a reuse. vLLM's
own tests run on it, see tests/compat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from block_manager.block_objects import (
    UNKNOWN,
    BlockHashIndex,
    BlocksByKey,
    FreeBlockQueue,
    KVCacheBlock,
    block_class,
)
from block_manager.block_pool import BlockPool
from block_manager.events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ExternalBlockHash,
    ExtraKeys,
)
from block_manager.group_keys import GROUP_KEYS, group_key, group_of, hash_of
from block_manager.kv_kernels import MORE_KEYS
from block_manager.page_pool import PageIds

logger = logging.getLogger(__name__)

Spans = Sequence[tuple[int, int]]


def no_extra_keys(request: Any, spans: Spans) -> ExtraKeys:
    """Of requests whose hashes cover tokens only."""
    return [None] * len(spans)


def whole_hash(block_hash: bytes) -> ExternalBlockHash:
    """A hash leaves as it is."""
    return block_hash


@dataclass(frozen=True, slots=True)
class HostTypes:
    """What the code around the pool expects to be given; by default classes of ours."""

    block: type = KVCacheBlock
    """Blocks are instances of it."""
    block_stored: Callable[..., Any] = BlockStored
    block_removed: Callable[..., Any] = BlockRemoved
    all_blocks_cleared: Callable[[], Any] = AllBlocksCleared
    extra_keys: Callable[[Any, Spans], ExtraKeys | None] = no_extra_keys
    """Of a request and of spans of its tokens: what hashes cover besides tokens, for events."""
    external_hash: Callable[[bytes], ExternalBlockHash] = whole_hash
    """How a hash is written into events."""


class VllmBlockPool:
    """vLLM's block pool, kept in our books.

    It also takes blocks that no pool made (their `pool` is None): they can be found by their keys
    under their ids, and never enter the free list.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        enable_caching: bool,
        hash_block_size: int,
        enable_kv_cache_events: bool = False,
        metrics_collector: Any = None,
        medium: str = MEDIUM_GPU,
        *,
        books: BlockPool | None = None,
        types: HostTypes | None = None,
    ) -> None:
        """Makes a pool of blocks 0 .. num_gpu_blocks - 1, of which the first is the null block.

        Args:
            num_gpu_blocks: blocks.
            enable_caching: whether content is reused.
            hash_block_size: tokens that each of a request's hashes covers more than the one before.
            enable_kv_cache_events: whether events are collected.
            metrics_collector: is told of blocks allocated, accessed and evicted.
            medium: where the content is, for events.
            books: of just these blocks, with keys in the format `GROUP_KEYS`; by default new ones.
            types: classes of the code around the pool.

        Raises:
            ValueError: there is no block, or the books are of other blocks.
        """
        if num_gpu_blocks < 1:
            raise ValueError(f"num_gpu_blocks: must be at least 1, not {num_gpu_blocks}")
        page_ids = np.arange(num_gpu_blocks)
        self.books = books or BlockPool(
            page_ids, key_format=GROUP_KEYS, enable_caching=enable_caching
        )
        if not np.array_equal(self.books.page_ids(), page_ids):
            raise ValueError(f"books: must be of the blocks 0..{num_gpu_blocks - 1}")
        self.num_gpu_blocks = num_gpu_blocks
        self.enable_caching = enable_caching
        self.hash_block_size = hash_block_size
        self.medium = medium
        self._types = types or HostTypes()
        block = block_class(self._types.block)
        self.blocks: list[Any] = [block(block_id, self) for block_id in range(num_gpu_blocks)]
        self.null_block = self.blocks[self.books.null_block]
        self.hashed_tokens = np.full(num_gpu_blocks, UNKNOWN, dtype=np.int64)
        self.free_block_queue = FreeBlockQueue(self.books, self.blocks)
        self._by_key = BlocksByKey(self.books, self.blocks)
        self.cached_block_hash_to_block = BlockHashIndex(self.books, self.blocks, self._by_key)
        self.enable_kv_cache_events = enable_kv_cache_events
        self.kv_event_queue: list[Any] = []
        self.metrics_collector = metrics_collector
        self._reuse_watchers: dict[int, Callable[[Any], None]] = {}

    @property
    def cached_block_hashes_by_block(self) -> dict[int, set[bytes]]:
        """The further keys of the blocks that have any."""
        kinds = self.books.cached_block_hash_to_block.key_kinds
        blocks = np.flatnonzero(kinds & MORE_KEYS).tolist()
        return {block: set(self._by_key.visible_keys(block, with_own=False)) for block in blocks}

    # ---------------------------------------------------------------- taking and giving back

    def get_num_free_blocks(self) -> int:
        """Blocks that can be handed out, reusable ones among them."""
        return self.books.num_free_blocks

    def get_usage(self) -> float:
        """Share of the blocks that requests hold, 0..1; the null block does not count."""
        # To the last bit what vLLM says: not the rounding of held / all.
        num_blocks = self.num_gpu_blocks - 1
        return 1.0 - self.books.num_free_blocks / num_blocks if num_blocks else 0.0

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        """Takes blocks from the front of the free list; what they held is gone.

        Raises:
            ValueError: not enough are free.
        """
        if num_blocks > self.books.num_free_blocks:
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
        if self._reuse_watchers or self.enable_kv_cache_events or self.metrics_collector:
            self._announce(self.books.free_block_queue.first_n(num_blocks))
        blocks = [self.blocks[block] for block in self.books.get_new_blocks(num_blocks).tolist()]
        if self.metrics_collector:
            for block in blocks:
                self.metrics_collector.on_block_allocated(block)
        return blocks

    def _announce(self, block_ids: PageIds) -> None:
        """Tells whom it concerns that blocks are about to be handed out."""
        blocks = [self.blocks[block] for block in block_ids.tolist()]
        self._notify_reuse(blocks)
        if not self.enable_caching:
            return
        for block in blocks:
            if self.metrics_collector:
                self.metrics_collector.on_block_evicted(block)
            if self.enable_kv_cache_events:
                self._emit_block_removed_events(self._by_key.visible_keys(block.block_id))

    def _notify_reuse(self, blocks: Iterable[Any]) -> None:
        for block in blocks:
            watcher = self._reuse_watchers.pop(block.block_id, None)
            if watcher is not None:
                watcher(block)

    def touch(self, blocks: Sequence[Any]) -> None:
        """Adds a reader to each block; a free one leaves the free list."""
        self.books.touch(_counted_ids(blocks, 1))
        if self.metrics_collector:
            for block in blocks:
                self.metrics_collector.on_block_accessed(block)

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Takes a reader away; the first block without readers is the first to be evicted.

        Blocks of another pool go to that pool.

        Raises:
            IntegrityError: a block is not held that often.
        """
        mine: list[Any] = []
        others: dict[Any, list[Any]] = {}
        for block in ordered_blocks:
            if block.pool is self or block.pool is None:
                mine.append(block)
            else:
                others.setdefault(block.pool, []).append(block)
        self.books.free_blocks(_counted_ids(mine, -1))
        for pool, blocks in others.items():
            pool.free_blocks(blocks)

    def unpin_blocks(self, blocks: Iterable[Any], on_reuse: Callable[[Any], None]) -> None:
        """Takes a reader away from blocks that are read on until they are handed out.

        They go to the tail of the free list; `on_reuse` is called when one is handed out, or when
        the pool is reset.

        Raises:
            IntegrityError: a block is not held that often.
        """
        blocks = list(blocks)
        block_ids = np.array([block.block_id for block in blocks], dtype=np.int64)
        self.books.free_blocks(block_ids, keep_all=True)
        self._reuse_watchers.update((block.block_id, on_reuse) for block in blocks)

    def is_block_writable(self, block: Any) -> bool:
        """Whether its one holder may change the block's content."""
        return not block.is_null and block.ref_cnt == 1 and block.block_hash is None

    # ---------------------------------------------------------------- reusable content

    def get_cached_block(
        self, block_hash: bytes, kv_cache_group_ids: Sequence[int]
    ) -> list[Any] | None:
        """Each group's block with this content, the first that got it; None if one is missing."""
        keys = [group_key(block_hash, group) for group in kv_cache_group_ids]
        found = self.books.cached_block_hash_to_block.find_prefix(keys)
        if len(found) < len(keys):
            return None
        return [self.blocks[block] for block in found.tolist()]

    def cache_full_blocks(
        self,
        request: Any,
        blocks: Sequence[Any],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: Sequence[bool] | None = None,
    ) -> None:
        """Makes the content of full blocks reusable.

        Args:
            request: whose content.
            blocks: all of the request.
            num_cached_blocks: those that are reusable already.
            num_full_blocks: those that are to be.
            block_size: tokens of a block.
            kv_cache_group_id: whose KV it is.
            block_mask: for each new one whether it is wanted; null blocks never are.

        Raises:
            AssertionError: a block has a hash of as many tokens or more.
        """
        if num_cached_blocks >= num_full_blocks:
            return
        assert block_mask is None or len(block_mask) == num_full_blocks - num_cached_blocks
        wanted = [
            place
            for place in range(num_cached_blocks, num_full_blocks)
            if not blocks[place].is_null
            and (block_mask is None or block_mask[place - num_cached_blocks])
        ]
        hashes = [self._boundary_hash(request, (place + 1) * block_size) for place in wanted]
        for place, block_hash in zip(wanted, hashes, strict=True):
            block, num_tokens = blocks[place], (place + 1) * block_size
            if block.block_hash is not None:
                # Only what was reusable up to a place inside the block may become so as a whole.
                assert block.block_hash_num_tokens is not None
                assert block.block_hash_num_tokens < num_tokens
                self._emit_block_removed_events(self._remove_cached_block_hashes(block))
            self._insert_block_hash(group_key(block_hash, kv_cache_group_id), block, num_tokens)
        if self.enable_kv_cache_events:
            self._report_stored(
                request,
                [(place * block_size, (place + 1) * block_size) for place in wanted],
                (num_cached_blocks * block_size, num_full_blocks * block_size),
                block_size,
                kv_cache_group_id,
            )

    def cache_partial_block(
        self,
        request: Any,
        block: Any,
        num_tokens: int,
        kv_cache_group_id: int,
        block_size: int,
        replace_existing_hashes: bool = False,
    ) -> bytes | None:
        """Makes a block reusable up to a place inside it, under one more key.

        Args:
            request: whose content.
            block: what holds it.
            num_tokens: of the history up to that place, a multiple of `hash_block_size`.
            kv_cache_group_id: whose KV it is.
            block_size: tokens of a block.
            replace_existing_hashes: the block's content is new: its old keys go.

        Returns:
            The key, or None for the null block.

        Raises:
            AssertionError: there is no hash for that place.
        """
        if block.is_null:
            return None
        assert block_size % self.hash_block_size == 0
        key = group_key(self._boundary_hash(request, num_tokens), kv_cache_group_id)
        is_known = block.block_hash == key or self.cached_block_hash_to_block.contain(
            key, block.block_id
        )
        covered = block.block_hash_num_tokens
        if replace_existing_hashes or (
            not is_known and covered is not None and covered < num_tokens
        ):
            is_known = False
            self._emit_block_removed_events(self._remove_cached_block_hashes(block))
        self._insert_block_hash(key, block, num_tokens)
        if self.enable_kv_cache_events and not is_known:
            span = (num_tokens - self.hash_block_size, num_tokens)
            self._report_stored(request, [span], span, self.hash_block_size, kv_cache_group_id)
        return key

    def emit_cached_block_events(
        self, request: Any, num_cached_blocks: int, block_size: int, kv_cache_group_id: int
    ) -> None:
        """Reports the leading blocks of a request as stored, since it reuses them."""
        if not self.enable_kv_cache_events or not num_cached_blocks:
            return
        spans = [(i * block_size, (i + 1) * block_size) for i in range(num_cached_blocks)]
        whole = (0, num_cached_blocks * block_size)
        self._report_stored(request, spans, whole, block_size, kv_cache_group_id)

    def _boundary_hash(self, request: Any, num_tokens: int) -> bytes:
        """The hash of a request's first tokens; each of its hashes covers all before it."""
        assert num_tokens % self.hash_block_size == 0
        num_hashes = num_tokens // self.hash_block_size
        assert 0 < num_hashes <= len(request.block_hashes)
        block_hash: bytes = request.block_hashes[num_hashes - 1]
        return block_hash

    def _insert_block_hash(self, key: bytes, block: Any, num_tokens: int | None) -> None:
        """Lets lookups find a block by a key: its own if it has none, else a further one."""
        index = self.books.cached_block_hash_to_block
        if block.pool is self and not index.key_kinds[block.block_id]:
            index.insert(np.array([block.block_id]), [key])
            self.hashed_tokens[block.block_id] = UNKNOWN if num_tokens is None else num_tokens
            return
        if block.block_hash == key or self.cached_block_hash_to_block.contain(key, block.block_id):
            return
        if block.block_hash is None:
            block.set_block_hash(key, num_tokens=num_tokens)
        self.cached_block_hash_to_block.insert(key, block)

    def _remove_cached_block_hashes(self, block: Any) -> list[bytes]:
        """Makes a block no longer reusable; returns the keys by which it was found."""
        removed = self._by_key.visible_keys(block.block_id)
        self.books.evict_blocks(np.array([block.block_id]))
        block.reset_hash()
        return removed

    def move_block_hashes(self, src_block: Any, dst_block: Any) -> None:
        """Lets lookups find a copy (a block without keys) where they found the original.

        Raises:
            AssertionError: the copy has a key.
        """
        index = self.books.cached_block_hash_to_block
        assert not index.key_kinds[dst_block.block_id]
        num_tokens = src_block.block_hash_num_tokens
        for key in self._remove_cached_block_hashes(src_block):
            self._insert_block_hash(key, dst_block, num_tokens)

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Makes blocks no longer reusable, also held ones.

        Raises:
            AssertionError: there is no such block.
        """
        for block in block_ids:
            assert 0 <= block < len(self.blocks), f"there is no block {block}"
            self._maybe_evict_cached_block(self.blocks[block])

    def _maybe_evict_cached_block(self, block: Any) -> bool:
        """Makes a block no longer reusable; whether lookups could find it."""
        if self.metrics_collector:
            self.metrics_collector.on_block_evicted(block)
        removed = self._remove_cached_block_hashes(block)
        self._emit_block_removed_events(removed)
        return bool(removed)

    def reset_prefix_cache(self) -> bool:
        """Forgets all reusable content; False, and nothing done, while blocks are held."""
        if not self.books.reset_prefix_cache():
            logger.warning("prefix cache not reset: %d blocks are held", self.books.num_held_blocks)
            return False
        self._notify_reuse([self.blocks[block] for block in list(self._reuse_watchers)])
        if self.metrics_collector:
            self.metrics_collector.reset()
        if self.enable_kv_cache_events:
            self.kv_event_queue.append(self._types.all_blocks_cleared())
        return True

    # ---------------------------------------------------------------- events

    def take_events(self) -> list[Any]:
        """Drains the events, oldest first."""
        if not self.enable_kv_cache_events:
            return []
        events, self.kv_event_queue = self.kv_event_queue, []
        return events

    def _emit_block_removed_events(self, keys: Iterable[bytes]) -> None:
        if not self.enable_kv_cache_events:
            return
        for key in keys:
            self.kv_event_queue.append(
                self._types.block_removed(
                    block_hashes=[self._types.external_hash(hash_of(key))],
                    medium=self.medium,
                    group_idx=group_of(key),
                )
            )

    def _report_stored(
        self,
        request: Any,
        spans: Spans,
        whole: tuple[int, int],
        block_size: int,
        kv_cache_group_id: int,
    ) -> None:
        """Reports the blocks of `spans` (tokens from, to) as stored; `whole` covers them all."""
        external = self._types.external_hash
        start, end = whole
        lora = request.lora_request
        self.kv_event_queue.append(
            self._types.block_stored(
                block_hashes=[external(self._boundary_hash(request, last)) for _, last in spans],
                parent_block_hash=external(self._boundary_hash(request, start)) if start else None,
                token_ids=request.all_token_ids[start:end],
                block_size=block_size,
                lora_id=lora.adapter_id if lora else None,
                medium=self.medium,
                lora_name=lora.name if lora else None,
                extra_keys=self._types.extra_keys(request, spans),
                group_idx=kv_cache_group_id,
                session_id=request.session_id,
            )
        )


def _counted_ids(blocks: Sequence[Any], change: int) -> PageIds:
    """Ids of the blocks whose readers the books count.

    They do not count those of the null block, and a loose block counts for itself.
    """
    block_ids = []
    for block in blocks:
        if block.pool is None:
            block.ref_cnt += change
        elif not block.is_null:
            block_ids.append(block.block_id)
    return np.array(block_ids, dtype=np.int64)

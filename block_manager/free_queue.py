"""The free list of KV blocks, in eviction order, with O(1) removal from the middle.

The order rules are those of vLLM's `FreeKVCacheBlockQueue` (v1/core/kv_cache_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from block_manager.block import KVCacheBlock


class FreeKVCacheBlockQueue:
    """Doubly linked through the blocks themselves, between two sentinels."""

    def __init__(self, blocks: Sequence[KVCacheBlock]) -> None:
        self.num_free_blocks = 0
        self._head = KVCacheBlock(block_id=-1)
        self._tail = KVCacheBlock(block_id=-1)
        self._head.next_free_block = self._tail
        self._tail.prev_free_block = self._head
        self.append_n(blocks)

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Takes the n blocks that are first in eviction order.

        Raises:
            ValueError: fewer than n are free, or n is negative.
        """
        if not 0 <= n <= self.num_free_blocks:
            raise ValueError(f"cannot take {n} blocks: {self.num_free_blocks} are free")
        taken: list[KVCacheBlock] = []
        for block in self:
            if len(taken) == n:
                break
            taken.append(block)
        for block in taken:
            self.remove(block)
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        """Takes one block out, wherever it stands."""
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise ValueError(f"block {block.block_id} is not in the free list")
        before.next_free_block = after
        after.prev_free_block = before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def append_n(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Puts blocks at the tail, in the given order: they are evicted last."""
        assert self._tail.prev_free_block is not None
        for block in blocks:
            self._link(self._tail.prev_free_block, block, self._tail)

    def prepend_n(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Puts blocks at the head, in the given order: they are evicted first."""
        before = self._head
        for block in blocks:
            assert before.next_free_block is not None
            self._link(before, block, before.next_free_block)
            before = block

    def _link(self, before: KVCacheBlock, block: KVCacheBlock, after: KVCacheBlock) -> None:
        before.next_free_block = after.prev_free_block = block
        block.prev_free_block, block.next_free_block = before, after
        self.num_free_blocks += 1

    def __iter__(self) -> Iterator[KVCacheBlock]:
        """Blocks in eviction order."""
        block = self._head.next_free_block
        while block is not None and block is not self._tail:
            following = block.next_free_block
            yield block
            block = following

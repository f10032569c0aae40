"""The block objects' pool against its rules written with lists, over random operations."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from block_manager.events import AllBlocksCleared, BlockRemoved, BlockStored
from block_manager.vllm_block_pool import VllmBlockPool

NUM_BLOCKS = 9
HASH_TOKENS = 2
BLOCK_TOKENS = 4
GROUPS = (0, 3)

Key = tuple[bytes, int]


def make_request(tokens: tuple[int, ...]) -> SimpleNamespace:
    ends = range(HASH_TOKENS, len(tokens) + 1, HASH_TOKENS)
    return SimpleNamespace(
        all_token_ids=list(tokens),
        block_hashes=[hashlib.sha256(bytes(tokens[:end])).digest() for end in ends],
        lora_request=None,
        session_id=None,
    )


REQUESTS = [
    make_request(tokens)
    for tokens in [(1,) * 12, (1,) * 8 + (2,) * 4, (1,) * 6 + (2,) * 6, (2,) * 12]
]
"""They begin alike up to the middle of a block."""

requests = st.sampled_from(REQUESTS)
groups = st.sampled_from(GROUPS)


class PlainPool:
    """What the pool should say."""

    def __init__(self) -> None:
        self.free = list(range(1, NUM_BLOCKS))
        self.readers = [0] * NUM_BLOCKS
        self.keys: list[list[Key]] = [[] for _ in range(NUM_BLOCKS)]
        self.tokens: list[int | None] = [None] * NUM_BLOCKS
        self.index: list[tuple[Key, int]] = []
        """Keys and who holds them, in the order in which they came."""
        self.events: list[Any] = []

    @property
    def held(self) -> list[int]:
        return [block for block in range(1, NUM_BLOCKS) if self.readers[block]]

    def holders(self, key: Key) -> list[int]:
        return [block for known, block in self.index if known == key]

    def forget(self, block: int) -> bool:
        had_keys = bool(self.keys[block])
        for block_hash, group in self.keys[block]:
            self.index.remove(((block_hash, group), block))
            self.events.append(BlockRemoved([block_hash], "GPU", group_idx=group))
        self.keys[block], self.tokens[block] = [], None
        return had_keys

    def remember(self, key: Key, block: int, num_tokens: int) -> None:
        if block in self.holders(key):
            return
        if not self.keys[block]:
            self.tokens[block] = num_tokens
        self.keys[block].append(key)
        self.index.append((key, block))

    def get_new(self, number: int) -> list[int]:
        taken, self.free = self.free[:number], self.free[number:]
        for block in taken:
            self.forget(block)
            self.readers[block] = 1
        return taken

    def touch(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self.readers[block]:
                self.free.remove(block)
            self.readers[block] += 1

    def release(self, blocks: list[int]) -> None:
        front: list[int] = []
        for block in blocks:
            self.readers[block] -= 1
            if not self.readers[block]:
                (self.free if self.keys[block] else front).append(block)
        self.free = front + self.free

    def stored(self, request: Any, ends: list[int], start: int, end: int, group: int) -> None:
        hashes = [request.block_hashes[last // HASH_TOKENS - 1] for last in ends]
        parent = request.block_hashes[start // HASH_TOKENS - 1] if start else None
        size = BLOCK_TOKENS if (end - start) % BLOCK_TOKENS == 0 else HASH_TOKENS
        tokens = request.all_token_ids[start:end]
        self.events.append(
            BlockStored(hashes, parent, tokens, size, None, "GPU", None, [None] * len(ends), group)
        )


class VllmBlockPoolMachine(RuleBasedStateMachine):
    """One operation on both after another; what they answer, hold and report stays equal."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = VllmBlockPool(NUM_BLOCKS, True, HASH_TOKENS, enable_kv_cache_events=True)
        self.plain = PlainPool()

    def objects(self, block_ids: list[int]) -> list[Any]:
        return [self.pool.blocks[block] for block in block_ids]

    @rule(number=st.integers(0, 4))
    def get_new_blocks(self, number: int) -> None:
        if number > len(self.plain.free):
            with pytest.raises(ValueError, match=f"Cannot get {number} free blocks"):
                self.pool.get_new_blocks(number)
            return
        taken = self.pool.get_new_blocks(number)
        assert [block.block_id for block in taken] == self.plain.get_new(number)

    @rule(request=requests, data=st.data(), group=groups)
    def find_and_touch(self, request: Any, data: st.DataObject, group: int) -> None:
        wanted = data.draw(st.sampled_from(request.block_hashes))
        found = self.pool.get_cached_block(wanted, [group])
        holders = self.plain.holders((wanted, group))
        assert (found or []) == self.objects(holders[:1])
        self.pool.touch(found or [])
        self.plain.touch(holders[:1])

    @rule(request=requests, data=st.data())
    def find_in_all_groups(self, request: Any, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(request.block_hashes))
        holders = [self.plain.holders((wanted, group)) for group in GROUPS]
        found = self.pool.get_cached_block(wanted, list(GROUPS))
        expected = self.objects([blocks[0] for blocks in holders]) if all(holders) else None
        assert found == expected

    @precondition(lambda self: self.plain.held)
    @rule(data=st.data())
    def free_blocks(self, data: st.DataObject) -> None:
        references = [block for block in self.plain.held for _ in range(self.plain.readers[block])]
        order = data.draw(st.permutations(references))
        chosen = order[: data.draw(st.integers(1, len(order)))]
        self.pool.free_blocks(reversed(self.objects(chosen)))
        self.plain.release(chosen[::-1])

    @precondition(lambda self: self.plain.held)
    @rule(request=requests, group=groups, data=st.data())
    def cache_full_blocks(self, request: Any, group: int, data: st.DataObject) -> None:
        """Blocks that are reusable as a whole already are left out by the mask."""
        blocks = data.draw(st.permutations([*self.plain.held, 0]))[:3]
        first = data.draw(st.integers(0, len(blocks)))
        mask = [(self.plain.tokens[block] or 0) < BLOCK_TOKENS for block in blocks[first:]]
        self.pool.cache_full_blocks(
            request, self.objects(blocks), first, len(blocks), BLOCK_TOKENS, group, mask
        )
        if first == len(blocks):
            return
        places = [place for place in range(first, len(blocks)) if mask[place - first]]
        places = [place for place in places if blocks[place] != 0]
        ends = [(place + 1) * BLOCK_TOKENS for place in places]
        for place, end in zip(places, ends, strict=True):
            self.plain.forget(blocks[place])
            key = (request.block_hashes[end // HASH_TOKENS - 1], group)
            self.plain.remember(key, blocks[place], end)
        span = (first * BLOCK_TOKENS, len(blocks) * BLOCK_TOKENS)
        self.plain.stored(request, ends, *span, group)

    @precondition(lambda self: self.plain.held)
    @rule(request=requests, group=groups, place=st.integers(1, 6), replaces=st.booleans())
    def cache_partial_block(self, request: Any, group: int, place: int, replaces: bool) -> None:
        block, num_tokens = self.plain.held[-1], place * HASH_TOKENS
        self.pool.cache_partial_block(
            request, self.pool.blocks[block], num_tokens, group, BLOCK_TOKENS, replaces
        )
        key = (request.block_hashes[place - 1], group)
        is_known = block in self.plain.holders(key)
        covered = self.plain.tokens[block]
        if replaces or (not is_known and covered is not None and covered < num_tokens):
            self.plain.forget(block)
            is_known = False
        self.plain.remember(key, block, num_tokens)
        if not is_known:
            self.plain.stored(request, [num_tokens], num_tokens - HASH_TOKENS, num_tokens, group)

    @precondition(lambda self: len(self.plain.held) > 1)
    @rule()
    def move_block_hashes(self) -> None:
        source, target = self.plain.held[0], self.plain.held[1]
        if self.plain.keys[target]:
            return
        self.pool.move_block_hashes(*self.objects([source, target]))
        tokens, num_events = self.plain.tokens[source], len(self.plain.events)
        keys = self.plain.keys[source]
        self.plain.forget(source)
        del self.plain.events[num_events:]
        for key in keys:
            self.plain.remember(key, target, tokens or 0)

    @rule(chosen=st.sets(st.integers(0, NUM_BLOCKS - 1)))
    def evict_blocks(self, chosen: set[int]) -> None:
        self.pool.evict_blocks(chosen)
        for block in chosen:
            self.plain.forget(block)

    @rule()
    def reset_prefix_cache(self) -> None:
        assert self.pool.reset_prefix_cache() is (not self.plain.held)
        if not self.plain.held:
            num_events = len(self.plain.events)
            for block in range(NUM_BLOCKS):
                self.plain.forget(block)
            self.plain.events[num_events:] = [AllBlocksCleared()]

    @invariant()
    def events_are_equal(self) -> None:
        assert self.pool.take_events() == self.plain.events
        self.plain.events = []

    @invariant()
    def blocks_are_equal(self) -> None:
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert free == self.plain.free
        for block in self.pool.blocks:
            keys = [
                name + group.to_bytes(4, "big") for name, group in self.plain.keys[block.block_id]
            ]
            assert block.ref_cnt == self.plain.readers[block.block_id]
            assert block.block_hash == (keys[0] if keys else None)
            assert block.block_hash_num_tokens == self.plain.tokens[block.block_id]
            more = self.pool.cached_block_hashes_by_block.get(block.block_id, set())
            assert more == set(keys[1:])

    @invariant()
    def books_add_up(self) -> None:
        assert len(self.pool.cached_block_hash_to_block) == len(
            {key for key, _ in self.plain.index}
        )
        self.pool.books.check_integrity()


TestVllmBlockPoolMachine = VllmBlockPoolMachine.TestCase
TestVllmBlockPoolMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)

"""Random operations on vLLM's block pool and on ours: equal answers, free lists and events.

Most of vLLM's tests hold whatever the eviction order is; here every operation is followed by a
comparison of the whole free list, of all new events and of what the operation returned or raised,
and every few operations by one of each block's count and keys. Run by `make compat`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm_types import VLLM_TYPES

from block_manager.vllm_block_pool import VllmBlockPool

HASH_TOKENS = 2
BLOCK_TOKENS = 6
GROUPS = (0, 1)
FULL_CHECK_EVERY = 8


class OrderedKeys(dict[bytes, None]):
    """A set in the order of insertion."""

    def add(self, key: bytes) -> None:
        self[key] = None


class OrderedKeysByBlock(dict[int, Any]):
    """vLLM keeps a block's further keys in a set, whose order is any; this order is ours."""

    def setdefault(self, block: int, default: Any = None) -> Any:
        return super().setdefault(block, OrderedKeys())


@dataclass
class Pair:
    """Both pools, and what their watchers of reuse were told."""

    theirs: Any
    ours: Any
    told: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))

    @property
    def pools(self) -> tuple[Any, Any]:
        return self.theirs, self.ours


def make_pair(num_blocks: int, enable_caching: bool) -> Pair:
    """Two pools of the same size with events."""
    theirs = BlockPool(num_blocks, enable_caching, HASH_TOKENS, enable_kv_cache_events=True)
    theirs.cached_block_hashes_by_block = OrderedKeysByBlock()
    ours = VllmBlockPool(
        num_blocks, enable_caching, HASH_TOKENS, enable_kv_cache_events=True, types=VLLM_TYPES
    )
    return Pair(theirs, ours)


def make_requests(dice: random.Random, number: int) -> list[SimpleNamespace]:
    """Requests that often begin alike, as histories of returning users do."""
    requests = []
    for i in range(number):
        tokens = [dice.randrange(2) for _ in range(5 * BLOCK_TOKENS)]
        salt = dice.choice([None, None, "salt"])
        hashes, parent = [], (salt or "").encode()
        for start in range(0, len(tokens), HASH_TOKENS):
            # Few tokens of each are hashed, so that equal content is common.
            parent = hashlib.sha256(parent + bytes(tokens[start : start + 1])).digest()
            hashes.append(parent)
        requests.append(
            SimpleNamespace(
                block_hashes=hashes,
                all_token_ids=tokens,
                lora_request=None,
                session_id=f"session-{i}" if i % 2 else None,
                mm_features=[],
                cache_salt=salt,
                prompt_embeds=None,
            )
        )
    return requests


def ids(answer: Any) -> Any:
    """An answer with ids in place of blocks."""
    if isinstance(answer, list):
        return [getattr(item, "block_id", item) for item in answer]
    return answer


def both(pair: Pair, operation: Callable[[Any, list[int]], Any]) -> None:
    """Does the same to both pools; they must answer or refuse alike."""
    answers = []
    for pool, told in zip(pair.pools, pair.told, strict=True):
        try:
            answers.append(("returned", ids(operation(pool, told))))
        except (ValueError, AssertionError) as error:
            kind = ValueError if isinstance(error, ValueError) else AssertionError
            answers.append(("raised", kind))
    assert answers[0] == answers[1], answers


class Operations:
    """Random operations that the pool's callers may do; one method each."""

    def __init__(self, pair: Pair, dice: random.Random) -> None:
        self.pair = pair
        self.dice = dice
        self.requests = make_requests(dice, 40)
        self.num_blocks = pair.theirs.num_gpu_blocks

    def held(self) -> list[int]:
        return [block.block_id for block in self.pair.theirs.blocks[1:] if block.ref_cnt > 0]

    def some(self, blocks: Iterable[int], most: int) -> list[int]:
        blocks = list(blocks)
        return self.dice.sample(blocks, min(len(blocks), self.dice.randint(0, most)))

    def get_new_blocks(self) -> None:
        free = self.pair.theirs.get_num_free_blocks()
        number = self.dice.choice([1, 1, 2, 3, 5, min(free, 9), free + 1])
        both(self.pair, lambda pool, _: pool.get_new_blocks(number))

    def touch(self) -> None:
        hashed = [block.block_id for block in self.pair.theirs.blocks if block.block_hash]
        wanted = self.some({*hashed, *self.held(), 0}, 4)
        both(self.pair, lambda pool, _: pool.touch([pool.blocks[i] for i in wanted]))

    def free_blocks(self) -> None:
        wanted = self.some(self.held(), 8)
        wanted += [i for i in wanted if self.pair.theirs.blocks[i].ref_cnt > 1]
        wanted += [0] * (self.dice.random() < 0.1)
        self.dice.shuffle(wanted)
        both(self.pair, lambda pool, _: pool.free_blocks(pool.blocks[i] for i in wanted))

    def unpin_blocks(self) -> None:
        wanted = self.some(self.held(), 2)

        def unpin(pool: Any, told: list[int]) -> None:
            blocks = [pool.blocks[i] for i in wanted]
            pool.unpin_blocks(blocks, lambda block: told.append(block.block_id))

        both(self.pair, unpin)

    def cache_full_blocks(self) -> None:
        request = self.dice.choice(self.requests)
        num_full = self.dice.randint(0, 5)
        num_cached = self.dice.randint(0, num_full)
        held = self.held()
        self.dice.shuffle(held)
        blocks = [held.pop() if held and self.dice.random() < 0.9 else 0 for _ in range(num_full)]
        # A block that is reusable as a whole already is refused; once in a while see that it is.
        mask = [
            not self._is_full(block) or self.dice.random() < 0.02 for block in blocks[num_cached:]
        ]
        group = self.dice.choice(GROUPS)
        both(
            self.pair,
            lambda pool, _: pool.cache_full_blocks(
                request,
                [pool.blocks[i] for i in blocks],
                num_cached,
                num_full,
                BLOCK_TOKENS,
                group,
                mask,
            ),
        )

    def _is_full(self, block: int) -> bool:
        return (self.pair.theirs.blocks[block].block_hash_num_tokens or 0) >= BLOCK_TOKENS

    def cache_partial_block(self) -> None:
        request = self.dice.choice(self.requests)
        block = self.dice.choice([*self.held(), 0])
        num_tokens = self.dice.randint(1, 5 * BLOCK_TOKENS)
        if self.dice.random() < 0.95:
            num_tokens = -(-num_tokens // HASH_TOKENS) * HASH_TOKENS
        group, replaces = self.dice.choice(GROUPS), self.dice.random() < 0.2
        both(
            self.pair,
            lambda pool, _: pool.cache_partial_block(
                request, pool.blocks[block], num_tokens, group, BLOCK_TOKENS, replaces
            ),
        )

    def emit_cached_block_events(self) -> None:
        request, number = self.dice.choice(self.requests), self.dice.randint(0, 5)
        both(
            self.pair,
            lambda pool, _: pool.emit_cached_block_events(request, number, BLOCK_TOKENS, 0),
        )

    def get_cached_block(self) -> None:
        wanted = self.dice.choice(self.dice.choice(self.requests).block_hashes)
        groups = self.dice.choice([[0], [1], [0, 1], []])
        both(self.pair, lambda pool, _: pool.get_cached_block(wanted, groups))

    def move_block_hashes(self) -> None:
        keyless = [i for i in self.held() if not self.pair.theirs.blocks[i].block_hash]
        hashed = [i for i in self.held() if self.pair.theirs.blocks[i].block_hash]
        if keyless and hashed:
            source, target = self.dice.choice(hashed), self.dice.choice(keyless)
            both(
                self.pair,
                lambda pool, _: pool.move_block_hashes(pool.blocks[source], pool.blocks[target]),
            )

    def evict_blocks(self) -> None:
        wanted = set(self.some(range(self.num_blocks), 3))
        wanted |= {self.num_blocks} if self.dice.random() < 0.02 else set()
        both(self.pair, lambda pool, _: pool.evict_blocks(wanted))

    def maybe_evict_cached_block(self) -> None:
        block = self.dice.randrange(self.num_blocks)
        both(self.pair, lambda pool, _: pool._maybe_evict_cached_block(pool.blocks[block]))

    def is_block_writable(self) -> None:
        block = self.dice.randrange(self.num_blocks)
        both(self.pair, lambda pool, _: pool.is_block_writable(pool.blocks[block]))

    def reset_prefix_cache(self) -> None:
        if self.dice.random() < 0.3:
            held = [i for i in self.held() for _ in range(self.pair.theirs.blocks[i].ref_cnt)]
            both(self.pair, lambda pool, _: pool.free_blocks([pool.blocks[i] for i in held]))
        both(self.pair, lambda pool, _: pool.reset_prefix_cache())


WEIGHTS = {
    "get_new_blocks": 8,
    "touch": 5,
    "free_blocks": 7,
    "unpin_blocks": 1,
    "cache_full_blocks": 8,
    "cache_partial_block": 5,
    "emit_cached_block_events": 1,
    "get_cached_block": 4,
    "move_block_hashes": 1,
    "evict_blocks": 1,
    "maybe_evict_cached_block": 1,
    "is_block_writable": 1,
    "reset_prefix_cache": 0.3,
}


def compare(pair: Pair) -> None:
    """What must be equal after each operation."""
    free = [[b.block_id for b in p.free_block_queue.get_all_free_blocks()] for p in pair.pools]
    assert free[0] == free[1], free
    assert pair.told[0] == pair.told[1], pair.told
    events = [pool.take_events() for pool in pair.pools]
    assert events[0] == events[1], events
    assert pair.theirs.get_usage() == pair.ours.get_usage()


def compare_blocks(pair: Pair) -> None:
    """Each block's count and keys. vLLM does not keep the null block's count."""
    for theirs, ours in zip(pair.theirs.blocks, pair.ours.blocks, strict=True):
        assert ours.is_null or theirs.ref_cnt == ours.ref_cnt, (theirs, ours)
        assert theirs.block_hash == ours.block_hash, (theirs, ours)
        assert theirs.block_hash_num_tokens == ours.block_hash_num_tokens, (theirs, ours)
    keys = [
        {block: set(keys) for block, keys in pool.cached_block_hashes_by_block.items()}
        for pool in pair.pools
    ]
    assert keys[0] == keys[1], keys
    index, cache = (pool.cached_block_hash_to_block._cache for pool in pair.pools)
    first = {key: next(iter(v)) if isinstance(v, dict) else v.block_id for key, v in index.items()}
    found = {key: next(iter(v)) if isinstance(v, dict) else v.block_id for key, v in cache.items()}
    assert first == found, (first, found)
    assert len(pair.theirs.cached_block_hash_to_block) == len(pair.ours.cached_block_hash_to_block)
    pair.ours.books.check_integrity()


def run(num_operations: int, num_blocks: int, enable_caching: bool, seed: int) -> dict[str, int]:
    """Does random operations; returns how often each was done."""
    dice = random.Random(seed)
    pair = make_pair(num_blocks, enable_caching)
    operations = Operations(pair, dice)
    done = dict.fromkeys(WEIGHTS, 0)
    names = dice.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=num_operations)
    for step, name in enumerate(names):
        getattr(operations, name)()
        done[name] += 1
        try:
            compare(pair)
            if step % FULL_CHECK_EVERY == 0:
                compare_blocks(pair)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, after operation {step} ({name}): {error}") from None
    return done


def main() -> None:
    """Runs pools of several sizes, with and without caching."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000, help="of all pools together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    logging.disable()  # A refused reset is logged by both pools.
    pools = [(8, True), (25, True), (60, True), (25, False)]
    share = -(-args.operations // len(pools))
    total = dict.fromkeys(WEIGHTS, 0)
    for place, (num_blocks, enable_caching) in enumerate(pools):
        for name, number in run(share, num_blocks, enable_caching, args.seed + place).items():
            total[name] += number
    print(f"compat differential: {sum(total.values())} operations, equal after each")
    if args.json:
        args.json.write_text(json.dumps(total), encoding="utf-8")


if __name__ == "__main__":
    main()

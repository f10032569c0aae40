"""The block pool against its rules written with a list and two dicts, over random operations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from block_manager.block_hash import BlockHash
from block_manager.block_pool import BlockPool
from block_manager.exceptions import IntegrityError

NULL, *BLOCKS = PAGES = [2, 3, 4, 6, 7, 8, 9, 11, 12, 15]
"""With gaps: the pages between are another tenant's."""
NOT_HELD = [NULL, 5, 14, 16, 99, 0, -1, -14]

HASHES = [
    # The first four begin alike, as hashes that fall into one bucket do.
    *(BlockHash(bytes(8) + bytes([last]) * 24) for last in range(4)),
    *(BlockHash(bytes([first]) * 32) for first in range(1, 4)),
]

hashes = st.lists(st.sampled_from(HASHES), max_size=6)


class PlainPool:
    """What the pool's books should say."""

    def __init__(self) -> None:
        self.free = list(BLOCKS)
        self.readers = dict.fromkeys(BLOCKS, 0)
        self.content: dict[int, BlockHash] = {}
        """In the order in which the content was cached."""
        self.dead: set[int] = set()
        self.num_evictions = 0

    @property
    def held(self) -> list[int]:
        return [block for block in BLOCKS if self.readers[block]]

    def find(self, wanted: list[BlockHash]) -> list[int]:
        found: list[int] = []
        for one in wanted:
            holders = [block for block, held in self.content.items() if held == one]
            if not holders:
                break
            found.append(holders[0])
        return found

    def get_new(self, number: int) -> list[int]:
        taken, self.free = self.free[:number], self.free[number:]
        for block in taken:
            self.readers[block] = 1
            if self.content.pop(block, None) is not None:
                self.num_evictions += 1
                self.dead.add(block)
        return taken

    def touch(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.readers[block] == 0:
                self.free.remove(block)
            self.readers[block] += 1

    def release(self, blocks: list[int]) -> None:
        front: list[int] = []
        for block in blocks:
            self.readers[block] -= 1
            if self.readers[block] == 0 and block in self.content:
                self.free.append(block)
            elif self.readers[block] == 0:
                front.append(block)
        self.dead.update(front)
        self.free = front + self.free


class BlockPoolMachine(RuleBasedStateMachine):
    """One operation on both after another; what they answer and what they hold stays equal."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(np.array(PAGES), track_dead=True)
        self.plain = PlainPool()

    @rule(number=st.integers(0, 4))
    def get_new_blocks(self, number: int) -> None:
        if number > len(self.plain.free):
            with pytest.raises(ValueError, match=f"{len(self.plain.free)} are free"):
                self.pool.get_new_blocks(number)
            return
        assert self.pool.get_new_blocks(number).tolist() == self.plain.get_new(number)

    @rule(wanted=hashes, limit=st.integers(0, 6))
    def find_and_touch(self, wanted: list[BlockHash], limit: int) -> None:
        found = self.pool.find_cached_prefix(wanted, limit)
        assert found.tolist() == self.plain.find(wanted[:limit])
        self.pool.touch(found)
        self.plain.touch(found.tolist())

    @rule(wanted=hashes, number=st.integers(0, 6))
    def allocate(self, wanted: list[BlockHash], number: int) -> None:
        """A prefix and new blocks at once; one block never stands twice in a history."""
        wanted = list(dict.fromkeys(wanted))[:number]
        found = self.plain.find(wanted)
        num_free = len([block for block in self.plain.free if block not in found])
        allocated = self.pool.allocate(wanted, number)
        if number - len(found) > num_free:
            assert allocated is None
            return
        self.plain.touch(found)
        blocks = found + self.plain.get_new(number - len(found))
        assert allocated is not None
        assert allocated[0].tolist() == blocks
        assert allocated[1] == len(found)

    @precondition(lambda self: self.plain.held)
    @rule(data=st.data())
    def free_blocks(self, data: st.DataObject) -> None:
        references = [block for block in BLOCKS for _ in range(self.plain.readers[block])]
        order = data.draw(st.permutations(references))
        chosen = order[: data.draw(st.integers(1, len(order)))]
        self.pool.free_blocks(np.array(chosen))
        self.plain.release(chosen)

    @rule(data=st.data())
    def free_too_much(self, data: st.DataObject) -> None:
        """The culprit's own references and one more, among those of others that are right."""
        culprit = data.draw(st.sampled_from(BLOCKS + NOT_HELD))
        chosen = self.plain.held + [culprit] * (self.plain.readers.get(culprit, 0) + 1)
        with pytest.raises(IntegrityError, match=f"block {culprit} was freed"):
            self.pool.free_blocks(np.array(data.draw(st.permutations(chosen))))

    @rule(wanted=hashes, data=st.data())
    def cache_blocks(self, wanted: list[BlockHash], data: st.DataObject) -> None:
        blank = [block for block in self.plain.held if block not in self.plain.content]
        pairs = list(zip(data.draw(st.permutations(blank)), wanted, strict=False))
        self.pool.cache_blocks(
            np.array([block for block, _ in pairs], dtype=np.int64), wanted[: len(pairs)]
        )
        self.plain.content.update(pairs)

    @rule(data=st.data())
    def cache_too_much(self, data: st.DataObject) -> None:
        blank = [block for block in self.plain.held if block not in self.plain.content]
        culprit = data.draw(st.sampled_from(BLOCKS + NOT_HELD))
        chosen = [block for block in blank if block != culprit]
        chosen += [culprit, culprit] if culprit in blank else [culprit]
        with pytest.raises(IntegrityError, match=f"block {culprit} cannot take a hash"):
            self.pool.cache_blocks(np.array(chosen), [HASHES[0]] * len(chosen))

    @rule(chosen=st.sets(st.sampled_from(BLOCKS)))
    def evict_blocks(self, chosen: set[int]) -> None:
        """Held blocks lose their content too, but not what their readers read."""
        evicted = [block for block in chosen if block in self.plain.content]
        assert self.pool.evict_blocks(np.array(sorted(chosen), dtype=np.int64)) == len(evicted)
        for block in evicted:
            del self.plain.content[block]
        self.plain.dead.update(block for block in evicted if not self.plain.readers[block])

    @rule()
    def reset_prefix_cache(self) -> None:
        assert self.pool.reset_prefix_cache() is (not self.plain.held)
        if not self.plain.held:
            self.plain.dead.update(self.plain.content)
            self.plain.content.clear()

    @rule()
    def take_dead_blocks(self) -> None:
        assert self.pool.take_dead_blocks() == sorted(self.plain.dead)
        self.plain.dead.clear()

    @invariant()
    def books_are_equal(self) -> None:
        assert self.pool.free_block_ids().tolist() == self.plain.free
        assert self.pool.ref_cnt[BLOCKS].tolist() == list(self.plain.readers.values())
        assert self.pool.num_evictions == self.plain.num_evictions
        assert self.pool.num_cached_blocks == len(self.plain.content)
        assert self.pool.num_held_blocks == len(self.plain.held)
        for one in HASHES:
            assert self.pool.find_cached_prefix([one], 1).tolist() == self.plain.find([one])

    @invariant()
    def books_add_up(self) -> None:
        self.pool.check_integrity()


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)

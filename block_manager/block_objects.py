"""The block pool's books as the objects that vLLM 0.32's classes work with.

Nothing is kept here that the books know: a block's count, hash and neighbours, the free list and
the content index are read from the books, and written to them, at each use. Names and meanings are
those of `KVCacheBlock` and `FreeKVCacheBlockQueue` (v1/core/kv_cache_utils.py) and of
`BlockHashToBlockMap` (v1/core/block_pool.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from block_manager.block_pool import BlockPool
from block_manager.group_keys import key_of, withheld
from block_manager.kv_kernels import UNLINKED
from block_manager.page_pool import PageIds

UNKNOWN = -1


class BlockHolder(Protocol):
    """A pool of block objects, as its blocks see it."""

    books: BlockPool
    free_block_queue: FreeBlockQueue
    hashed_tokens: npt.NDArray[np.int64]
    """Tokens that each block's own hash covers, or UNKNOWN, int64 [ids]."""


class KVCacheBlock:
    """What a block object carries itself; the rest `BlockView` reads from the books."""

    __slots__ = ("block_id", "is_null", "pool")


# The class that a view is mixed into has the places of its attributes.
_NONE: tuple[str, ...] = ()


class BlockView:
    """A block of a pool, mixed into a class of blocks by `block_class`."""

    __slots__ = _NONE
    block_id: int
    pool: BlockHolder
    is_null: bool

    def __init__(self, block_id: int, pool: BlockHolder) -> None:
        self.block_id = block_id
        self.pool = pool
        self.is_null = block_id == pool.books.null_block

    # There is one object for each block, so blocks are equal when they are the same.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def ref_cnt(self) -> int:
        """Running requests that hold the block."""
        return int(self.pool.books.ref_cnt[self.block_id])

    @ref_cnt.setter
    def ref_cnt(self, count: int) -> None:
        self.pool.books.ref_cnt[self.block_id] = count

    @property
    def block_hash(self) -> bytes | None:
        """The key of the block's content, or None."""
        words = self.pool.books.cached_block_hash_to_block.own_words(self.block_id)
        return None if words is None else key_of(words)[0]

    @property
    def block_hash_num_tokens(self) -> int | None:
        """Tokens from the history's begin that the hash covers, where that is known."""
        if self.block_hash is None or self.pool.hashed_tokens[self.block_id] == UNKNOWN:
            return None
        return int(self.pool.hashed_tokens[self.block_id])

    _block_hash = block_hash
    _block_hash_num_tokens = block_hash_num_tokens

    def set_block_hash(self, block_hash: bytes, num_tokens: int | None = None) -> None:
        """Gives the block its hash; until the hash is in the index, lookups do not find it.

        Raises:
            AssertionError: the block has one.
        """
        assert self.block_hash is None, f"block {self.block_id} has a hash already"
        index = self.pool.books.cached_block_hash_to_block
        index.insert(np.array([self.block_id]), [withheld(block_hash)])
        self.pool.hashed_tokens[self.block_id] = UNKNOWN if num_tokens is None else num_tokens

    def reset_hash(self) -> None:
        """Takes the block's hash, also out of the index."""
        index = self.pool.books.cached_block_hash_to_block
        words = index.own_words(self.block_id)
        if words is not None:
            key, is_withheld = key_of(words)
            index.pop_key(self.block_id, withheld(key) if is_withheld else key)

    @property
    def prev_free_block(self) -> Any:
        """The block before in the free list, its head, or None where the block is not in it."""
        return self.pool.free_block_queue.block_before(self.block_id)

    @property
    def next_free_block(self) -> Any:
        """The block after in the free list, its tail, or None where the block is not in it."""
        return self.pool.free_block_queue.block_after(self.block_id)


def block_class(base: type) -> type:
    """A class of blocks that are instances of `base` and live in the books."""
    return type(base.__name__, (BlockView, base), {"__slots__": ()})


class FreeListEnd:
    """The head or the tail of a free list: a block to those who follow links, but never free."""

    block_id = UNLINKED

    def __init__(self, queue: FreeBlockQueue, is_head: bool) -> None:
        self._queue = queue
        self._is_head = is_head

    @property
    def next_free_block(self) -> Any:
        """The first block, or the tail of an empty list; None behind the tail."""
        return self._queue.block_after(self._queue.head_id) if self._is_head else None

    @property
    def prev_free_block(self) -> Any:
        """The last block, or the head of an empty list; None before the head."""
        return None if self._is_head else self._queue.block_before(self._queue.head_id + 1)


class FreeBlockQueue:
    """The free list as blocks."""

    def __init__(self, books: BlockPool, blocks: Sequence[Any]) -> None:
        self._free = books.free_block_queue
        self._blocks = blocks
        self.head_id = len(books.ref_cnt)
        """Where the books' list begins; its tail is the next place."""
        self.fake_free_list_head = FreeListEnd(self, is_head=True)
        self.fake_free_list_tail = FreeListEnd(self, is_head=False)

    @property
    def num_free_blocks(self) -> int:
        """Length of the list."""
        return self._free.num_free_blocks

    def block_after(self, place: int) -> Any:
        """What follows a block, None where the block is not in the list."""
        return self._at(int(self._free.links.following[place]))

    def block_before(self, place: int) -> Any:
        """What precedes a block, likewise."""
        return self._at(int(self._free.links.preceding[place]))

    def _at(self, place: int) -> Any:
        if place == UNLINKED:
            return None
        if place < self.head_id:
            return self._blocks[place]
        return self.fake_free_list_head if place == self.head_id else self.fake_free_list_tail

    def popleft(self) -> Any:
        """Takes the first block.

        Raises:
            ValueError: none is free.
        """
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        """Takes the first n blocks.

        Raises:
            ValueError: fewer are free.
        """
        return self._objects(self._free.popleft_n(n))

    def remove(self, block: Any) -> None:
        """Takes a block out.

        Raises:
            RuntimeError: it is not in the list.
        """
        try:
            self._free.remove(_ids([block]))
        except ValueError as error:
            raise RuntimeError(str(error)) from error

    def append(self, block: Any) -> None:
        """Puts a block at the tail."""
        self.append_n([block])

    def append_n(self, blocks: Sequence[Any]) -> None:
        """Puts blocks at the tail, in the given order."""
        self._free.append_n(_ids(blocks))

    def prepend_n(self, blocks: Sequence[Any]) -> None:
        """Puts blocks at the head, in the given order."""
        self._free.prepend_n(_ids(blocks))

    def get_all_free_blocks(self) -> list[Any]:
        """All blocks in eviction order."""
        return self._objects(self._free.get_all_free_blocks())

    def iter_blocks_after(self, cursor: Any) -> Iterator[Any]:
        """The blocks behind one, or all for None, read while the caller goes."""
        place = self.head_id if cursor is None else cursor.block_id
        while (block := self.block_after(place)) not in (None, self.fake_free_list_tail):
            yield block
            place = block.block_id

    def _objects(self, block_ids: PageIds) -> list[Any]:
        return [self._blocks[block] for block in block_ids.tolist()]


def _ids(blocks: Sequence[Any]) -> PageIds:
    return np.array([block.block_id for block in blocks], dtype=np.int64)


class BlocksByKey(MutableMapping[bytes, Any]):
    """Keys of content to the block that holds it, or to a dict of blocks by id where several do.

    A copy is a plain dict that keeps what the index says now.
    """

    def __init__(self, books: BlockPool, blocks: Sequence[Any]) -> None:
        self._index = books.cached_block_hash_to_block
        self._blocks = blocks

    def visible_keys(self, block_id: int, with_own: bool = True) -> list[bytes]:
        """Keys by which lookups find a block, its own first."""
        own = self._index.own_words(block_id) if with_own else None
        words = ([] if own is None else [own]) + self._index.extra_words(block_id)
        return [key for key, is_withheld in map(key_of, words) if not is_withheld]

    def add(self, key: bytes, block_id: int) -> None:
        """Lets lookups find a block by one more key, after those that have it."""
        own = self._index.own_words(block_id)
        if own is not None and key_of(own) == (key, True):
            self._index.pop_key(block_id, withheld(key))
            self._index.insert(np.array([block_id]), [key])
        elif block_id not in self._index.holders(key):
            self._index.insert_extra(block_id, key)

    def discard(self, key: bytes, block_id: int) -> bool:
        """Lets no lookup find a block by a key; a block's own key stays known to it."""
        own = self._index.own_words(block_id)
        is_own = own is not None and key_of(own) == (key, False)
        was_there = self._index.pop_key(block_id, key)
        if was_there and is_own:
            self._index.insert(np.array([block_id]), [withheld(key)])
        return was_there

    def __getitem__(self, key: bytes) -> Any:
        found = [self._blocks[block] for block in self._index.holders(key)]
        if not found:
            raise KeyError(key)
        return found[0] if len(found) == 1 else {block.block_id: block for block in found}

    def __setitem__(self, key: bytes, value: Any) -> None:
        self.pop(key, None)
        for block in _as_dict(value):
            self.add(key, block)

    def __delitem__(self, key: bytes) -> None:
        for block in _as_dict(self[key]):
            self.discard(key, block)

    def __iter__(self) -> Iterator[bytes]:
        blocks = np.flatnonzero(self._index.key_kinds).tolist()
        return iter({key: None for block in blocks for key in self.visible_keys(block)})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __copy__(self) -> dict[bytes, Any]:
        return dict(self)

    def __eq__(self, other: object) -> bool:
        """Whether the same blocks hold the same content: a lone block may be in a dict or not."""
        if not isinstance(other, Mapping):
            return NotImplemented
        mine = {key: _as_dict(value) for key, value in self.items()}
        return mine == {key: _as_dict(value) for key, value in other.items()}

    __hash__ = None  # type: ignore[assignment]


def _as_dict(value: Any) -> dict[int, Any]:
    return value if isinstance(value, dict) else {value.block_id: value}


class BlockHashIndex:
    """The content index by block objects."""

    def __init__(self, books: BlockPool, blocks: Sequence[Any], by_key: BlocksByKey) -> None:
        self._index = books.cached_block_hash_to_block
        self._blocks = blocks
        self._cache = by_key

    def get_one_block(self, key: bytes) -> Any:
        """The first block that got the key, or None."""
        found = self._index.find_prefix([key])
        return self._blocks[int(found[0])] if len(found) else None

    def contain(self, key: bytes, block_id: int) -> bool:
        """Whether lookups find the block by the key."""
        return block_id in self._index.holders(key)

    def insert(self, key: bytes, block: Any) -> None:
        """Lets lookups find the block by the key."""
        self._cache.add(key, block.block_id)

    def pop(self, key: bytes, block_id: int) -> Any:
        """Lets no lookup find the block by the key; returns it, or None where none did."""
        return self._blocks[block_id] if self._cache.discard(key, block_id) else None

    def __len__(self) -> int:
        return len(self._cache)

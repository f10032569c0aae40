"""What happens to reusable KV, noted between steps and made into messages on another thread.

To note a change is to keep references to arrays that are there anyway: a step waits for nothing
else. Token ids, extra keys and bytes are made of them by whoever sends them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from block_manager.block_hash import BLOCK_HASH_BYTES, NO_USER_TAG, BlockHash
from block_manager.block_hash_map import KeyWords
from block_manager.events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ExtraKeys,
)

KvEvent = BlockStored | BlockRemoved | AllBlocksCleared

NO_ITEM = 0
"""Token id of a token that reads no row; vLLM's consumers know no ids below 0."""

_FEATURE_DIGEST_BYTES = 8
_HASHES_PER_EVENT = 16_384
"""Of an event that tells all that is there: a message of half a megabyte."""


class HashedTokens(Protocol):
    """The inputs of a history's tokens that its hashes cover; they never change."""

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row that each token reads, below 0 where it reads none, [L]."""
        ...

    @property
    def features(self) -> npt.NDArray[np.int64]:
        """What else the model reads of each, [L, F]."""
        ...


class StoredBlocks(NamedTuple):
    """Blocks of one history, one behind the other, became reusable."""

    hashes: Sequence[BlockHash]
    parent: BlockHash | None
    """Of the block before them, None where the history begins."""
    first_token: int
    tokens: HashedTokens | None
    """Of the whole history; None = the messages bring no tokens."""
    user_tag: int


class RemovedBlocks(NamedTuple):
    """Blocks are no longer reusable."""

    words: KeyWords
    """Their hashes, int64 [n, words]."""


class ClearedBlocks(NamedTuple):
    """Nothing is reusable any more."""


KvChange = StoredBlocks | RemovedBlocks | ClearedBlocks


class KvEventLog:
    """Changes since they were last taken, oldest first; for the thread that steps."""

    def __init__(self) -> None:
        self._changes: list[KvChange] = []

    def add(self, change: KvChange) -> None:
        """Notes a change."""
        self._changes.append(change)

    def take(self) -> list[KvChange]:
        """Drains the changes."""
        changes, self._changes = self._changes, []
        return changes


def events_of(
    changes: Iterable[KvChange], block_tokens: int, redact: bool = False
) -> list[KvEvent]:
    """Changes as messages, in their order.

    Args:
        changes: from a `KvEventLog`.
        block_tokens: tokens of a block.
        redact: leaves out what tells of a history's content: token ids and the features' digest,
            which stands for so few bytes that it could be guessed.
    """
    events: list[KvEvent] = []
    for change in changes:
        if isinstance(change, StoredBlocks):
            events.append(_stored(change, block_tokens, redact))
        elif isinstance(change, RemovedBlocks):
            events.append(BlockRemoved(hash_bytes(change.words), MEDIUM_GPU))
        else:
            events.append(AllBlocksCleared())
    return events


def snapshot_events(words: KeyWords, block_tokens: int) -> list[list[KvEvent]]:
    """All that is reusable (hashes as int64 [n, words]), as the events of one or more batches.

    The first clears what was known. Content that several blocks hold is there as often. The order
    of the hashes says nothing here, and there are no parents and no tokens.
    """
    batches: list[list[KvEvent]] = [[AllBlocksCleared()]]
    for first in range(0, len(words), _HASHES_PER_EVENT):
        hashes = hash_bytes(words[first : first + _HASHES_PER_EVENT])
        batches.append([_block_stored(hashes, None, [], block_tokens, None)])
    return batches


def hash_bytes(words: KeyWords) -> list[bytes | int]:
    """Hashes (int64 [n, words]) as bytes."""
    cut: list[bytes | int] = words.reshape(-1).view(f"V{BLOCK_HASH_BYTES}").tolist()
    return cut


def _stored(change: StoredBlocks, block_tokens: int, redact: bool) -> BlockStored:
    first = change.first_token
    end = first + len(change.hashes) * block_tokens
    token_ids: list[int] = []
    if change.tokens is not None and not redact:
        token_ids = np.maximum(change.tokens.rows[first:end], NO_ITEM).tolist()
    extra_keys = _extra_keys(change, None if redact else change.tokens, block_tokens)
    return _block_stored(list(change.hashes), change.parent, token_ids, block_tokens, extra_keys)


def _block_stored(
    hashes: list[bytes | int],
    parent: bytes | None,
    token_ids: list[int],
    block_tokens: int,
    extra_keys: ExtraKeys | None,
) -> BlockStored:
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=token_ids,
        block_size=block_tokens,
        lora_id=None,
        medium=MEDIUM_GPU,
        lora_name=None,
        extra_keys=extra_keys,
    )


def _extra_keys(
    change: StoredBlocks, tokens: HashedTokens | None, block_tokens: int
) -> ExtraKeys | None:
    """What hashes cover besides item ids: the user's keyed hash, a digest of other features."""
    user: tuple[str, ...] = () if change.user_tag == NO_USER_TAG else (f"{change.user_tag:016x}",)
    number = len(change.hashes)
    if tokens is None or not tokens.features.shape[1]:
        return [user] * number if user else None
    first = change.first_token
    read = tokens.features[first : first + number * block_tokens]
    rows = np.ascontiguousarray(read, dtype="<i8")
    chunks: list[bytes] = rows.reshape(-1).view(f"V{rows.nbytes // number}").tolist()
    return [(*user, _digest(chunk)) for chunk in chunks]


def _digest(features: bytes) -> str:
    return hashlib.blake2b(features, digest_size=_FEATURE_DIGEST_BYTES).hexdigest()

"""Keys of content where a model's layers fall into groups: a block's hash, and whose KV it is.

The bytes are those of vLLM 0.32's `BlockHashWithGroupId` (v1/core/kv_cache_utils.py): the hash,
then the group's number, 4 bytes, big-endian. Hashes may be of any kind up to 34 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from block_manager.block_hash_map import KeyFormat

_GROUP_BYTES = 4
_MAX_KEY_BYTES = 38
_WORDS_BYTES = 40
# What fills a key up: zeros, the key's length, and whether lookups may find it.
_TAILS = [bytes(_MAX_KEY_BYTES - n) + bytes((n, 0)) for n in range(_MAX_KEY_BYTES + 1)]


def group_key(block_hash: bytes, group_id: int) -> bytes:
    """The key of a block's content for one group."""
    return block_hash + group_id.to_bytes(_GROUP_BYTES, "big")


def hash_of(key: bytes) -> bytes:
    """The block's hash in a key."""
    return key[:-_GROUP_BYTES]


def group_of(key: bytes) -> int:
    """The group's number in a key."""
    return int.from_bytes(key[-_GROUP_BYTES:], "big")


def withheld(key: bytes) -> bytes:
    """Another key, for a block that remembers this one while nobody may find it there."""
    return key + _TAILS[len(key)][:-1] + b"\1"


def key_of(words: npt.NDArray[np.int64]) -> tuple[bytes, bool]:
    """A key from its words (int64 [5]), and whether it is withheld."""
    raw = words.tobytes()
    return raw[: raw[-2]], raw[-1] == 1


def _words(keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
    try:
        filled = [key if len(key) == _WORDS_BYTES else key + _TAILS[len(key)] for key in keys]
    except IndexError:
        raise ValueError(f"a key may have up to {_MAX_KEY_BYTES} bytes") from None
    return np.frombuffer(b"".join(filled), dtype=np.int64).reshape(-1, _WORDS_BYTES // 8)


GROUP_KEYS = KeyFormat(_WORDS_BYTES // 8, _words)
"""What the block pool calls content by when it serves layers in groups."""

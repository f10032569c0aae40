"""Hashes of KV blocks, each over all that stands before the block's end: equal hashes, equal KV.

A block's hash covers the root and every model-visible input of its rows and of all rows before
them. The root covers the model's version and a keyed hash of the user, so KV is never shared
between users or models and the plain user id never leaves the front.
"""

from __future__ import annotations

import hashlib
from typing import NewType, cast

import numpy as np
import numpy.typing as npt

BlockHash = NewType("BlockHash", bytes)

BLOCK_HASH_BYTES = hashlib.sha256().digest_size
"""Length of every block's hash."""

NO_USER_TAG = 0
"""Of blocks that are no user's."""

_FORMAT = b"helm-kv-2"


def user_digest(user: str, key: bytes) -> bytes:
    """Keyed hash of a user id, 16 bytes; without the key it tells nothing about the user.

    Raises:
        ValueError: the key is empty.
    """
    if not key:
        raise ValueError("key: must not be empty")
    return hashlib.blake2b(user.encode(), key=key, digest_size=16).digest()


def user_tag(digest: bytes) -> int:
    """A user's digest as a whole number above 0 that fits an int64, to be kept for each block.

    Should two users ever share one, forgetting the first forgets the second's KV too.
    """
    return max(1, int.from_bytes(digest[:8], "little") >> 1)


def root_hash(model_version: str, user: bytes) -> BlockHash:
    """What the hashes of a history begin with.

    Args:
        model_version: digest of the weights and tables.
        user: from `user_digest`.
    """
    digest = hashlib.sha256(_FORMAT)
    for part in (model_version.encode(), user):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return BlockHash(digest.digest())


def hash_blocks(
    root: BlockHash, features: npt.NDArray[np.int64], block_tokens: int
) -> list[BlockHash]:
    """Hashes of the full blocks of a history: SHA-256 of the root and all rows to the block's end.

    Args:
        root: from `root_hash`.
        features: int64 [rows, features]: all inputs that a row's K and V depend on beyond the rows
            before it.
        block_tokens: rows of a block; a last, partly filled block has no hash.

    Returns:
        One hash for each full block, oldest first.
    """
    num_blocks = len(features) // block_tokens
    if not num_blocks:
        return []
    rows = np.ascontiguousarray(features[: num_blocks * block_tokens], dtype="<i8")
    block_bytes = rows.nbytes // num_blocks
    # One running hash, read after each block, and NumPy cuts the bytes: to start a hash for each
    # block and to slice here takes half as long again.
    chunks: list[bytes] = rows.reshape(-1).view(f"V{block_bytes}").tolist()
    running = hashlib.sha256(root)
    update, digest = running.update, running.digest
    digests: list[bytes] = []
    for chunk in chunks:
        update(chunk)
        digests.append(digest())
    return cast("list[BlockHash]", digests)

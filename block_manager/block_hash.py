"""Chained hashes of KV blocks: equal hashes mean equal K and V.

A block's hash covers its parent's hash and every model-visible input of its rows. The chain's
root covers the model's version, the contextual values and a keyed hash of the user, so KV is
never shared between users or models and the plain user id never leaves the front.
"""

from __future__ import annotations

import hashlib
from typing import NewType

import numpy as np
import numpy.typing as npt

BlockHash = NewType("BlockHash", bytes)

_FORMAT = b"helm-kv-1"


def user_digest(user: str, key: bytes) -> bytes:
    """Keyed hash of a user id, 16 bytes; without the key it tells nothing about the user.

    Raises:
        ValueError: the key is empty.
    """
    if not key:
        raise ValueError("key: must not be empty")
    return hashlib.blake2b(user.encode(), key=key, digest_size=16).digest()


def root_hash(model_version: str, user: bytes, context: bytes = b"") -> BlockHash:
    """Parent of a history's first block.

    Args:
        model_version: digest of the weights and tables.
        user: from `user_digest`.
        context: the request's contextual values, encoded; empty for models that take none.
    """
    digest = hashlib.sha256(_FORMAT)
    for part in (model_version.encode(), user, context):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return BlockHash(digest.digest())


def hash_blocks(
    root: BlockHash, features: npt.NDArray[np.int64], block_tokens: int
) -> list[BlockHash]:
    """Hashes of the full blocks of a history.

    Args:
        root: from `root_hash`.
        features: int64 [rows, features]: all inputs that a row's K and V depend on beyond the rows
            before it.
        block_tokens: rows of a block; a last, partly filled block has no hash.

    Returns:
        One hash for each full block, oldest first.
    """
    hashes: list[BlockHash] = []
    parent = root
    rows = np.ascontiguousarray(features, dtype="<i8")
    for start in range(0, len(rows) - block_tokens + 1, block_tokens):
        digest = hashlib.sha256(parent)
        digest.update(rows[start : start + block_tokens].tobytes())
        parent = BlockHash(digest.digest())
        hashes.append(parent)
    return hashes

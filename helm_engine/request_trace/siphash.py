"""SipHash-2-4 of many short messages at once (Aumasson and Bernstein, INDOCRYPT 2012).

A keyed hash: who lacks the key cannot find an id by hashing those that there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Int64Array = npt.NDArray[np.int64]


class SipKey(NamedTuple):
    """128 bits."""

    low: int
    high: int

    @classmethod
    def of(cls, secret: bytes) -> SipKey:
        """A key of 16 bytes.

        Raises:
            ValueError: they are more or fewer.
        """
        if len(secret) != 16:
            raise ValueError(f"secret: must be 16 bytes, not {len(secret)}")
        return cls(int.from_bytes(secret[:8], "little"), int.from_bytes(secret[8:], "little"))


def siphash(words: npt.NDArray[np.uint64], key: SipKey) -> npt.NDArray[np.uint64]:
    """Hashes of messages of whole words, little-endian.

    Args:
        words: uint64 [n, words of a message].
        key: the same one makes the same hashes.

    Returns:
        uint64 [n].
    """
    # A copy, for a read-only array would have the kernel compiled once more.
    words = np.array(words, dtype=np.uint64, order="C")
    hashes: npt.NDArray[np.uint64] = _siphash(words, np.uint64(key.low), np.uint64(key.high))
    return hashes


def hashed_ids(words: npt.NDArray[np.uint64], key: SipKey) -> Int64Array:
    """The upper 63 bits of `siphash`: ids of at least 0, int64 [n]."""
    return (siphash(words, key) >> np.uint64(1)).view(np.int64)


@njit(nogil=True, cache=True, inline="always")
def _turned(value: Any, bits: Any) -> Any:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@njit(nogil=True, cache=True, inline="always")
def _round(v0: Any, v1: Any, v2: Any, v3: Any) -> Any:
    v0 += v1
    v1 = _turned(v1, 13) ^ v0
    v0 = _turned(v0, 32)
    v2 += v3
    v3 = _turned(v3, 16) ^ v2
    v0 += v3
    v3 = _turned(v3, 21) ^ v0
    v2 += v1
    v1 = _turned(v1, 17) ^ v2
    v2 = _turned(v2, 32)
    return v0, v1, v2, v3


@njit(nogil=True, cache=True)
def _siphash(words: Any, low: Any, high: Any) -> Any:
    hashes = np.empty(len(words), dtype=np.uint64)
    length = np.uint64(words.shape[1] * 8 % 256) << np.uint64(56)
    for place in range(len(words)):
        v0 = low ^ np.uint64(0x736F6D6570736575)
        v1 = high ^ np.uint64(0x646F72616E646F6D)
        v2 = low ^ np.uint64(0x6C7967656E657261)
        v3 = high ^ np.uint64(0x7465646279746573)
        for word in words[place]:
            v3 ^= word
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
            v0 ^= word
        v3 ^= length
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0 ^= length
        v2 ^= np.uint64(0xFF)
        for _ in range(4):
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        hashes[place] = v0 ^ v1 ^ v2 ^ v3
    return hashes

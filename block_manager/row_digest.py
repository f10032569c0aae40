"""Which embedding rows an engine holds, small enough to be told: positions instead of rows.

Where the catalogue has no more rows than the digest has positions, a row's position is the row
itself and the digest is exact. Beyond that several rows share a position, found by Fibonacci
hashing (Knuth, The Art of Computer Programming, volume 3, section 6.4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: neighbouring rows land far apart."""
_HALF_WORD = np.uint64(32)


def position_of_rows(rows: Int64Array, num_rows: int, num_positions: int) -> Int64Array:
    """Where in the digest rows stand.

    Args:
        rows: int64 [n], each of 0..num_rows - 1.
        num_rows: rows of the table.
        num_positions: of the digest, at most 2^32.

    Returns:
        int64 [n], each of 0..num_positions - 1; the rows themselves where there is a position for
        each.
    """
    if num_rows <= num_positions:
        return rows
    hashed = rows.astype(np.uint64) * _GOLDEN >> _HALF_WORD
    return (hashed * np.uint64(num_positions) >> _HALF_WORD).astype(np.int64)

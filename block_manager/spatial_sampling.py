"""Which users and rows are looked at: chosen by a hash of their id, so always the same ones.

All accesses of a chosen id are seen and none of another, so reuse distances and hits of the chosen
are those of all, scaled: the idea of SHARDS (Waldspurger, Park, Garthwaite and Ahmad, "Efficient
MRC Construction with SHARDS", FAST 2015). The hash is SplitMix64's (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NOT_SAMPLED = -1

_MASK = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class SpatialSample:
    """A share of all ids, chosen by hash."""

    def __init__(self, share: float, seed: int) -> None:
        """Takes the share, above 0 and up to 1.

        Raises:
            ValueError: the share is out of range.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: must be above 0 and at most 1, not {share}")
        self.share = share
        self._limit = int(share * (1 << 64))
        self._start = (seed + 1) * _INCREMENT & _MASK

    def has_user(self, user_tag: int) -> bool:
        """Whether a user is chosen; a tag is a hash already, the seed only turns it."""
        return (user_tag * _INCREMENT + self._start) & _MASK < self._limit

    def places(self, num_ids: int) -> tuple[npt.NDArray[np.int32], int]:
        """Numbers the chosen ones of ids 0..num_ids - 1 in their order.

        Returns:
            The number of each id, or NOT_SAMPLED, int32 [num_ids]; how many are chosen.
        """
        bits = np.arange(num_ids, dtype=np.uint64) * np.uint64(_INCREMENT)
        bits += np.uint64(self._start)
        for shift, multiplier in _MULTIPLIERS:
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(multiplier)
        bits ^= bits >> np.uint64(31)
        chosen = (
            np.flatnonzero(bits < np.uint64(self._limit))
            if self.share < 1.0
            else np.arange(num_ids)
        )
        places = np.full(num_ids, NOT_SAMPLED, dtype=np.int32)
        places[chosen] = np.arange(len(chosen))
        return places, len(chosen)

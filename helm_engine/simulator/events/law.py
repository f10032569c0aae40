"""What a law of events is asked, and what it says."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

Int64Array = npt.NDArray[np.int64]


class Asked(NamedTuple):
    """Requests in the order in which they come, as a law of events sees them."""

    people: Int64Array
    """Who makes each, numbered in the order in which they first come, int64 [n]."""
    lengths: Int64Array
    """Events of the history at each, int64 [n]."""
    regimes: Int64Array
    """Number of the regime whose laws each follows, int64 [n]."""
    candidates: Int64Array
    """To draw for each, int64 [n]."""
    new_events: Int64Array
    """Of each request's candidates, so many join the history after it: the first, int64 [n]."""
    drift: Int64Array
    """Ranks that popularity has drifted by until each, int64 [n]."""

    @property
    def num_people(self) -> int:
        """They are 0 .. num_people - 1."""
        return int(self.people.max(initial=-1)) + 1

    @property
    def first_visits(self) -> Int64Array:
        """Number of each person's first request, int64 [people]."""
        places: Int64Array = np.unique(self.people, return_index=True)[1]
        return places

    @property
    def first_bounds(self) -> Int64Array:
        """Where each person's first history begins among all, and the last ends."""
        return bounds_of(self.lengths[self.first_visits])

    @property
    def shown_bounds(self) -> Int64Array:
        """Where each request's candidates begin among all, and the last's end."""
        return bounds_of(self.candidates)


class Drawn(NamedTuple):
    """Items, one bag after the other."""

    first_histories: Int64Array
    """Of each person's first request, oldest first; bounded by `Asked.first_bounds`."""
    shown: Int64Array
    """Candidates of each request; bounded by `Asked.shown_bounds`."""


class EventLaw(Protocol):
    """Draws the events of one setting. A law keeps nothing: the same arguments, the same draws."""

    def new_events(self, regimes: Int64Array, rng: np.random.Generator) -> Int64Array:
        """How many events each request brings into its history, 1 .. its candidates: int64 [n].

        Args:
            regimes: number of the regime whose laws each follows, int64 [n].
            rng: of nothing else.
        """
        ...

    def draw(self, asked: Asked, rng: np.random.Generator, keys: tuple[int, int]) -> Drawn:
        """All items.

        Args:
            asked: what to draw.
            rng: of nothing else.
            keys: of draws that are hashes of their numbers: of first histories, of candidates.
        """
        ...


def bounds_of(sizes: Int64Array) -> Int64Array:
    """Where bags of these sizes begin in one array, and where the last ends: int64 [bags + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@njit(nogil=True, cache=True)
def uniform(number: Any, key: Any) -> Any:
    """Draw of that number in [0, 1): SplitMix64, as `event_model.HashedUniforms`."""
    bits = (uint64(number) + uint64(1)) * uint64(0x9E3779B97F4A7C15) + key
    bits = (bits ^ (bits >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> uint64(27))) * uint64(0x94D049BB133111EB)
    bits ^= bits >> uint64(31)
    return np.float64(bits >> uint64(11)) * 2.0**-53

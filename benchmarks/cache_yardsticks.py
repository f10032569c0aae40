"""What the EMB tenant's row policy is held against: LRU, LFU and the optimum, plain and slow.

A step looks up distinct rows all at once, and a lookup hits where the row was there before the
step. Then a cache of C rows keeps C of the rows that it had and that the step brought. All three
are this one rule and differ in what they keep. All may keep a row of the step out (bypass):

- LRU keeps those used last; of one step, those that came last.
- LFU keeps those used most often since the beginning, absent rows counted too; of equally frequent
  ones, those used last. Counts never age.
- The optimum keeps those that are used again soonest. Between two uses a row needs a place or the
  second one misses, so hits are intervals on C places, and to give up the interval that ends last
  is optimal (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966;
  Carlisle and Lloyd, "On the k-coloring of intervals", 1995). No policy that knows the past alone
  can hit more often.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_MOST_STEPS = 1 << 32
"""A step and a count share one number."""


class Step(NamedTuple):
    """The rows that one step looks up."""

    row_ids: Int64Array
    """Distinct, int64 [n]."""
    times: Int64Array
    """How often the step uses each, int64 [n]."""


class Stream(NamedTuple):
    """Lookups in the order of time."""

    num_rows: int
    """Row ids are below it."""
    steps: list[Step]

    @property
    def num_lookups(self) -> int:
        """Distinct rows of each step, summed over the steps."""
        return sum(len(step.row_ids) for step in self.steps)

    @property
    def num_distinct(self) -> int:
        """Rows that are looked up at all."""
        return len(np.unique(np.concatenate([step.row_ids for step in self.steps])))


def lru_hits(stream: Stream, capacity: int) -> Int64Array:
    """Hits of each step when the rows used last are kept: int64 [steps]."""
    worth = np.zeros(stream.num_rows, dtype=np.int64)
    cache = _BestRows(stream.num_rows, capacity)
    hits, used = [], 1
    for step in stream.steps:
        worth[step.row_ids] = used + np.arange(len(step.row_ids))
        used += len(step.row_ids)
        hits.append(cache.use(step.row_ids, worth))
    return np.array(hits, dtype=np.int64)


def lfu_hits(stream: Stream, capacity: int) -> Int64Array:
    """Hits of each step when the rows used most often are kept: int64 [steps]."""
    counts = np.zeros(stream.num_rows, dtype=np.int64)
    worth = np.zeros(stream.num_rows, dtype=np.int64)
    cache = _BestRows(stream.num_rows, capacity)
    hits, used = [], 1
    for step in stream.steps:
        counts[step.row_ids] += step.times
        last_uses = used + np.arange(len(step.row_ids))
        used += len(step.row_ids)
        worth[step.row_ids] = counts[step.row_ids] * _MOST_STEPS + last_uses
        hits.append(cache.use(step.row_ids, worth))
    return np.array(hits, dtype=np.int64)


def optimal_hits(stream: Stream, capacity: int) -> Int64Array:
    """Hits of each step when the rows used again soonest are kept: int64 [steps]."""
    worth = np.zeros(stream.num_rows, dtype=np.int64)
    cache = _BestRows(stream.num_rows, capacity)
    hits = []
    for step, next_uses in zip(stream.steps, _next_uses(stream), strict=True):
        worth[step.row_ids] = -next_uses
        hits.append(cache.use(step.row_ids, worth))
    return np.array(hits, dtype=np.int64)


def _next_uses(stream: Stream) -> list[Int64Array]:
    """Number of the step that uses each row again, by step; that of all steps where none does."""
    upcoming = np.full(stream.num_rows, len(stream.steps))
    found = []
    for number in range(len(stream.steps) - 1, -1, -1):
        row_ids = stream.steps[number].row_ids
        found.append(upcoming[row_ids])
        upcoming[row_ids] = number
    return found[::-1]


class _BestRows:
    """A cache that keeps the rows of most worth; of equal ones, any."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self._capacity = capacity
        self._is_resident = np.zeros(num_rows, dtype=np.bool_)
        self._resident = np.empty(0, dtype=np.int64)

    def use(self, row_ids: Int64Array, worth: Int64Array) -> int:
        """Looks up distinct rows (int64 [n]), then keeps by `worth` (int64 [num_rows])."""
        is_hit = self._is_resident[row_ids]
        known = np.concatenate([self._resident, row_ids[~is_hit]])
        surplus = max(0, len(known) - self._capacity)
        order = np.argpartition(worth[known], surplus - 1) if surplus else np.arange(len(known))
        self._is_resident[known[order[:surplus]]] = False
        self._resident = known[order[surplus:]]
        self._is_resident[self._resident] = True
        return int(is_hit.sum())

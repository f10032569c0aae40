"""What KV pages are worth at every size of the tenant, from the reuse distances of its users.

The KV tenant evicts in LRU order, histories tail first, so what it holds at one size it holds at
every larger one: it is a stack algorithm (Mattson, Gecsei, Slutz and Traiger, "Evaluation
techniques for storage hierarchies", 1970), and one pass over the visits tells what each size would
have reused. A user's blocks are used together, so the stack is one of users: the distance of a
visit is the blocks of all users who came since this user last did, and block j of the history is
still there when the tenant has room for the distance and for j blocks before it. One tree lookup
per visit finds the distance, however many blocks the history has (Olken, "Efficient methods for
calculating the success function of fixed space replacement policies", 1981).

A block that is reused spares its tokens' work, and the rows of its tokens: those that the step does
not look up anyway and that the EMB tenant does not hold at this moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.block_hash import NO_USER_TAG, BlockHash
from block_manager.spatial_sampling import SpatialSample

_NUM_BINS = 1024
"""Sizes of the tenant that are told apart: a thousandth of the pool is less than one history."""
_MIN_VISITS, _MAX_VISITS = 1 << 10, 1 << 20
_VISITS_PER_PAGE = 2
"""Visits that are remembered: most histories have several blocks, so by then a user's are gone."""
_TAIL_MEMORY = 64
"""Requests over which the pages without reusable content are averaged."""
_FAR_VISITS = 8
"""Where a visit would gain at less than half or more than twice the present size only, one in so
many is priced and stands for all: it matters only after a long move of the boundary."""
_ROW_VISITS = 4
"""Of the others the rows of one in so many are looked at and stand for all: that is what costs."""
_NEVER = -1
_LAST_STAMP = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True)
class PageCosts:
    """What the work costs that pages spare, in milliseconds."""

    token_ms: float
    """Of computing a context token, attention apart."""
    attention_pair_ms: float
    """Of one query-key pair over all layers."""
    row_miss_ms: float
    """Of loading a row from the host tier."""

    def __post_init__(self) -> None:
        """Checks that every cost is at least 0 and finite.

        Raises:
            ValueError: names the field.
        """
        for name, value in asdict(self).items():
            if not 0.0 <= value < inf:
                raise ValueError(f"{name}: must be at least 0 and finite, not {value}")


class SavedAround(NamedTuple):
    """Milliseconds since the start, decayed, for a page near the present size of the tenant."""

    more: float
    """That one page more would have spared."""
    less: float
    """That the last page did spare."""
    num_samples: float
    """Sampled visits to which these pages made a difference."""


class KVReuseCurve:
    """Milliseconds that each further KV page would have spared the sampled users' visits."""

    def __init__(
        self,
        num_pages: int,
        block_tokens: int,
        num_rows: int,
        costs: PageCosts,
        sample: SpatialSample,
    ) -> None:
        """Takes the most pages whose worth may be asked for."""
        self._block_tokens = block_tokens
        self._costs = costs
        self._sample = sample
        self._width = -(-num_pages // _NUM_BINS)
        num_bins = -(-num_pages // self._width)
        self._saved_ms = np.zeros(num_bins)
        """By the page that would spare them, a bin of pages each."""
        self._starts = np.zeros(num_bins)
        """Visits whose first reusable block would sit in a bin."""
        self._ends = np.zeros(num_bins)
        """Likewise, their last."""
        least = min(max(_VISITS_PER_PAGE * num_pages, _MIN_VISITS), _MAX_VISITS)
        num_visits = 1 << (least - 1).bit_length()
        self._blocks = np.zeros(num_visits, dtype=np.int64)
        """Of each remembered visit that is still its user's latest, else 0; a ring."""
        self._tags = np.zeros(num_visits, dtype=np.int64)
        self._tree = np.zeros(num_visits + 1, dtype=np.int64)
        self._latest: dict[int, tuple[int, int, BlockHash]] = {}
        """A user's latest visit, its blocks, and the hash of the last of them."""
        self._num_visits = 0
        self._tail_pages = 0.0
        self.num_pages = num_pages
        """Pages that KV has now: near it the curve is drawn with more care."""
        self._marks = np.zeros(num_rows, dtype=np.int32)
        self._stamp = 0

    def observe(
        self,
        user_tag: int,
        hashes: Sequence[BlockHash],
        rows: npt.NDArray[np.int64],
        candidate_rows: npt.NDArray[np.int64],
        slot_of_row: npt.NDArray[np.int32],
        num_running: int,
        max_cached_tokens: int,
    ) -> None:
        """Takes a request that is admitted now.

        Args:
            user_tag: of whom.
            hashes: of the history's full blocks whose K and V are final; empty = no reuse.
            rows: that its context tokens read, NO_ROW among them, int64 [tokens].
            candidate_rows: that its candidates read, int64 [n].
            slot_of_row: below 0 where a row is absent from the EMB tenant, int32 [num_rows].
            num_running: requests that hold blocks.
            max_cached_tokens: tokens that may be reused at most.
        """
        if not hashes or user_tag == NO_USER_TAG or not self._sample.has_user(user_tag):
            return
        # Pages of running requests whose content nobody can reuse are missing from the stack.
        tail = -(-len(rows) // self._block_tokens) - len(hashes)
        self._tail_pages += (tail - self._tail_pages) / _TAIL_MEMORY
        previous, reusable = self._find(user_tag, hashes)
        number, self._num_visits = self._num_visits, self._num_visits + 1
        distance, dropped = _visit(
            self._tree, self._blocks, self._tags, number, previous, user_tag, len(hashes)
        )
        if dropped != NO_USER_TAG and self._latest[dropped][0] == number - len(self._blocks):
            del self._latest[dropped]
        self._latest[user_tag] = (number, len(hashes), hashes[-1])
        unusable = 1 + self._tail_pages * max(1, num_running)  # The null block is one.
        first = round(distance / self._sample.share + unusable)
        reusable = min(reusable, max_cached_tokens // self._block_tokens)
        if not reusable or first // self._width >= len(self._saved_ms):
            return
        weight, row_weight = 1, 1
        if first >= 2 * self.num_pages or first + reusable <= self.num_pages // 2:
            weight = 0 if number % _FAR_VISITS else _FAR_VISITS
        else:
            row_weight = 0 if number % _ROW_VISITS else _ROW_VISITS
        if weight:
            self._add(weight, row_weight, first, reusable, rows, candidate_rows, slot_of_row)

    def _find(self, user_tag: int, hashes: Sequence[BlockHash]) -> tuple[int, int]:
        """A user's previous visit and its blocks, _NEVER and 0 if this history does not extend it.

        Then the blocks of the previous one stay where they are in the stack: they are evicted in
        their turn.
        """
        found = self._latest.get(user_tag)
        if found is None:
            return _NEVER, 0
        number, num_blocks, last = found
        is_remembered = self._num_visits - number < len(self._blocks)
        if is_remembered and num_blocks <= len(hashes) and hashes[num_blocks - 1] == last:
            return number, num_blocks
        return _NEVER, 0

    def _add(
        self,
        weight: int,
        row_weight: int,
        first: int,
        blocks: int,
        rows: npt.NDArray[np.int64],
        candidate_rows: npt.NDArray[np.int64],
        slot_of_row: npt.NDArray[np.int32],
    ) -> None:
        if self._stamp == _LAST_STAMP:
            self._marks[:] = 0
            self._stamp = 0
        self._stamp += 1
        _add_savings(
            self._saved_ms,
            self._starts,
            self._ends,
            self._width,
            weight,
            first,
            blocks,
            self._block_tokens,
            self._costs.token_ms,
            self._costs.attention_pair_ms,
            self._costs.row_miss_ms * row_weight,
            rows,
            candidate_rows,
            slot_of_row,
            self._marks,
            self._stamp,
        )

    def fade(self, factor: float) -> None:
        """Counts all that was observed less."""
        _fade(self._saved_ms, self._starts, self._ends, factor)

    def saved_ms(self, first: int, last: int) -> float:
        """What pages `first` to `last` - 1 would have spared, all users' visits together."""
        found: float = _sum_between(self._saved_ms, first / self._width, last / self._width)
        return found / self._sample.share

    def around(self, step: int) -> SavedAround:
        """What one page of the next step would have spared, and one of the last step did."""
        pages, width = self.num_pages, self._width
        low = max(0, pages - step)
        more, less, visits = _around(
            self._saved_ms, self._starts, self._ends, width, low, pages, pages + step
        )
        share = self._sample.share
        return SavedAround(more / (share * step), less / (share * max(1, pages - low)), visits)


# ---------------------------------------------------------------- compiled


@njit(cache=True, nogil=True)
def _add_at(tree: Any, place: Any, number: Any) -> None:
    """Fenwick, "A new data structure for cumulative frequency tables", 1994."""
    place += 1
    while place < len(tree):
        tree[place] += number
        place += place & -place


@njit(cache=True, nogil=True)
def _sum_before(tree: Any, place: Any) -> Any:
    total = 0
    while place > 0:
        total += tree[place]
        place -= place & -place
    return total


@njit(cache=True, nogil=True)
def _sum_between(bins: Any, low: Any, high: Any) -> Any:
    """Sum of bins, of the first and the last one the part that lies between: places in bins."""
    total = 0.0
    for place in range(int(low), min(int(high) + 1, len(bins))):
        total += bins[place] * (min(high, place + 1.0) - max(low, float(place)))
    return total


@njit(cache=True, fastmath={"reassoc"})
def _around(
    saved_ms: Any, starts: Any, ends: Any, width: Any, low: Any, pages: Any, high: Any
) -> Any:
    """Sums of what pages from `pages` to `high` and from `low` to `pages` spare, and the visits.

    It keeps the interpreter's lock: it takes about a microsecond, while getting back a lock that
    another thread has taken meanwhile takes milliseconds.
    """
    more = _sum_between(saved_ms, pages / width, high / width)
    less = _sum_between(saved_ms, low / width, pages / width)
    visits = 0.0
    for place in range(min(high // width + 1, len(starts))):
        visits += starts[place]
    for place in range(low // width):
        visits -= ends[place]
    return more, less, visits


@njit(cache=True)
def _fade(saved_ms: Any, starts: Any, ends: Any, factor: Any) -> None:
    for place in range(len(saved_ms)):
        saved_ms[place] *= factor
        starts[place] *= factor
        ends[place] *= factor


@njit(cache=True, nogil=True)
def _visit(
    tree: Any, blocks: Any, tags: Any, number: Any, previous: Any, tag: Any, num_blocks: Any
) -> Any:
    """Puts a visit on top of the stack, in a ring of the latest ones.

    Returns:
        Blocks of the visits above the user's previous one, 0 without one; the tag of the user whose
        visit the ring forgot, or NO_USER_TAG.
    """
    place = number % len(blocks)
    dropped = NO_USER_TAG
    if blocks[place]:
        dropped = tags[place]
        _add_at(tree, place, -blocks[place])
        blocks[place] = 0
    distance = 0
    if previous != _NEVER:
        before = previous % len(blocks)
        distance = _sum_before(tree, place) - _sum_before(tree, before + 1)
        if before > place:
            distance += _sum_before(tree, len(blocks))
        _add_at(tree, before, -blocks[before])
        blocks[before] = 0
    _add_at(tree, place, num_blocks)
    blocks[place] = num_blocks
    tags[place] = tag
    return distance, dropped


@njit(cache=True, nogil=True)
def _add_savings(
    saved_ms: Any,
    starts: Any,
    ends: Any,
    width: Any,
    weight: Any,
    first: Any,
    num_blocks: Any,
    block_tokens: Any,
    token_ms: Any,
    attention_pair_ms: Any,
    row_miss_ms: Any,
    rows: Any,
    candidate_rows: Any,
    slot_of_row: Any,
    marks: Any,
    stamp: Any,
) -> None:
    """Adds what each reusable block spares to the page that it would sit on.

    From the last one to the first: a row is spared once no token behind it reads it.
    """
    if row_miss_ms > 0.0:
        for row in candidate_rows:
            if row >= 0:
                marks[row] = stamp
        for token in range(num_blocks * block_tokens, len(rows)):
            if rows[token] >= 0:
                marks[rows[token]] = stamp
    for block in range(num_blocks - 1, -1, -1):
        absent = 0
        start = block * block_tokens
        if row_miss_ms > 0.0:
            for token in range(start, start + block_tokens):
                row = rows[token]
                if row >= 0 and marks[row] != stamp:
                    marks[row] = stamp
                    absent += slot_of_row[row] < 0
        place = (first + block) // width
        if place < len(saved_ms):
            pairs = block_tokens * start + block_tokens * (block_tokens + 1) // 2
            saved_ms[place] += weight * (
                block_tokens * token_ms + pairs * attention_pair_ms + absent * row_miss_ms
            )
    starts[first // width] += weight
    last = (first + num_blocks - 1) // width
    if last < len(ends):
        ends[last] += weight

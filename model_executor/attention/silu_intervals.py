"""Which keys the queries of a span read: an interval for each, whatever the rule."""

from __future__ import annotations

from typing import Any

from model_executor.attention.silu_memory import Constants, Int64Array, Scratch
from model_executor.attention.silu_tile import ROWS, compiled


@compiled
def list_queries(span: Any, constants: Constants, scratch: Scratch) -> Any:
    """Lists context queries and then candidates, and which keys each of them reads.

    Returns:
        How many strips they fill.
    """
    rows, firsts, ends = scratch.rows, scratch.firsts, scratch.ends
    length = span.start + span.num_rows
    number = span.num_queries + span.num_candidates
    num_strips = -(-number // ROWS)
    for place in range(num_strips * ROWS):
        # The last query is repeated where the last strip is not full: it reads no more for that.
        query = min(place, number - 1)
        candidate = query - span.num_queries
        is_context = candidate < 0
        row = span.first_query + query if is_context else span.first_candidate_query + candidate
        rows[place] = row if place < number else -1
        position = span.first_position + query if is_context else length
        firsts[place], ends[place] = interval_of(position, length, constants)
        own = num_strips * ROWS + place
        firsts[own], ends[own] = 0, 0
        if not is_context:
            firsts[own], ends[own] = candidate - candidate % constants.group_size, candidate + 1
    bounds = scratch.lows, scratch.highs, scratch.all_from, scratch.all_to
    _list_strips(2 * num_strips, firsts, ends, *bounds)
    return num_strips


@compiled
def interval_of(position: int, length: int, constants: Constants) -> tuple[int, int]:
    """`context_mask` as an interval: the first key that is read, and the key behind the last."""
    if position < constants.num_open_rows:
        return 0, length
    first = 0
    if constants.window > 0:
        # Open rows share one place; whoever reaches it reads all of them.
        shift = max(0, constants.num_open_rows - 1)
        reach = position - shift - constants.window
        first = reach + shift if reach > 0 else 0
    return first, min(position + 1, length)


@compiled
def _list_strips(
    num_strips: int,
    firsts: Int64Array,
    ends: Int64Array,
    lows: Int64Array,
    highs: Int64Array,
    all_from: Int64Array,
    all_to: Int64Array,
) -> None:
    """Works out what any query of a strip reads, and what all read."""
    for strip in range(num_strips):
        low, high = firsts[strip * ROWS], ends[strip * ROWS]
        all_low, all_high = low, high
        for place in range(strip * ROWS + 1, (strip + 1) * ROWS):
            first, end = firsts[place], ends[place]
            all_low, all_high = max(all_low, first), min(all_high, end)
            if first < end:
                low = min(low, first) if low < high else first
                high = max(high, end)
        lows[strip], highs[strip], all_from[strip], all_to[strip] = low, high, all_low, all_high


@compiled
def keys_read(first_strip: int, num_strips: int, scratch: Scratch) -> tuple[int, int]:
    """First key that any of some strips reads, and the key behind the last."""
    lows, highs, low, high = scratch.lows, scratch.highs, 0, 0
    for strip in range(first_strip, first_strip + num_strips):
        if lows[strip] < highs[strip]:
            low = min(low, lows[strip]) if high > 0 else lows[strip]
            high = max(high, highs[strip])
    return low, high

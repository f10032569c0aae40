"""SiLU attention of all sequences of a step, compiled.

A strip of a few queries meets a tile of keys: the scores, which stay in the first cache, become
weights in place, and the weighted values are added to the strip's sums. What a query reads is an
interval of keys, whatever the rule, so that a tile is skipped, or whole, or cut for each query.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from model_executor.attention.silu_intervals import keys_read, list_queries
from model_executor.attention.silu_memory import (
    Bias,
    Constants,
    Floats,
    Rows,
    Scratch,
    Step,
    as_float,
    pack_strip,
    pack_tile,
    padded,
    write_sums,
)
from model_executor.attention.silu_tile import (
    COLUMNS,
    ROWS,
    block_product,
    compiled,
    use_wide_vectors,
)
from model_executor.attention.silu_vectors import biased_silu_pass, silu, silu_pass


@compiled
def _attend_span(
    head: int,
    span: Any,
    num_strips: int,
    step: Step,
    constants: Constants,
    scratch: Scratch,
    bias: Bias,
) -> None:
    """Writes what the queries of a span read, for one head."""
    use_wide_vectors()
    is_first = True
    has_groups = span.num_candidates > 0 and constants.group_size > 1
    for own in range(2 if has_groups else 1):
        low, high = keys_read(own * num_strips, num_strips, scratch)
        # Tiles of about the same width, since a narrow one costs as much at its borders.
        num_tiles = max(1, -(-(high - low) // constants.keys_per_tile))
        width = padded(max(1, -(-(high - low) // num_tiles)))
        for first in range(low, high, width):
            end = min(first + width, high)
            pack_tile(head, span, first, end, own == 1, step, constants, scratch)
            _attend_tile(
                first, end, num_strips, own, head, is_first, step.q, constants, scratch, bias
            )
            is_first = False
    if is_first:
        # Nothing but what candidates read of themselves.
        scratch.sums[: num_strips * ROWS * padded(constants.dv)] = 0
    if not has_groups:
        _attend_alone(head, span, step, constants, scratch.sums)
    write_sums(head, num_strips, step.attended, constants, scratch)


@compiled
def _attend_tile(
    tile_first: int,
    tile_end: int,
    num_strips: int,
    own: int,
    head: int,
    is_first: bool,
    q: Rows,
    constants: Constants,
    scratch: Scratch,
    bias: Bias,
) -> None:
    """Adds what all strips read of a tile of keys.

    With the first tile of a head it copies queries and clears sums as it comes to them: memory is
    waited for beside products then.
    """
    use_wide_vectors()
    lows, highs, all_from, all_to = scratch.lows, scratch.highs, scratch.all_from, scratch.all_to
    queries, keys, scores = scratch.queries, scratch.keys, scratch.scores
    values, sums, firsts, ends = scratch.values, scratch.sums, scratch.firsts, scratch.ends
    rows, q_array, q_at, biases = scratch.rows, q.array, head * q.head, bias.array
    width, dqk, dv = constants.keys_per_tile, constants.dqk, padded(constants.dv)
    for strip in range(num_strips):
        if is_first:
            factor = constants.score_factor
            pack_strip(strip, rows, q_array, q_at, q.row, queries, dqk, factor)
            sums[strip * ROWS * dv : (strip + 1) * ROWS * dv] = 0
        listed = own * num_strips + strip
        low = max(lows[listed] - tile_first, 0)
        high = min(highs[listed], tile_end) - tile_first
        if low >= high:
            continue
        begin, stop = low // COLUMNS * COLUMNS, padded(high)
        at = strip * ROWS * dqk
        for key in range(begin, stop, COLUMNS):
            block_product(
                queries, at, 1, ROWS, keys, key * dqk, COLUMNS, scores, key, width, dqk, False
            )
            # At once, so that divisions go on beside the next product.
            first = tile_first + key
            if bias.num_keys == 0:
                for row in range(ROWS):
                    silu_pass(scores, key + row * width, COLUMNS)
            else:
                bias_at = strip * ROWS * bias.num_keys + first - bias.first_key
                _weigh_biased(scores, key, width, biases, bias_at, bias.num_keys)
            if all_from[listed] > first or all_to[listed] < first + COLUMNS:
                _mask_block(scores, key, width, firsts, ends, listed * ROWS, first)
        for column in range(0, dv, COLUMNS):
            value, total = low * dv + column, strip * ROWS * dv + column
            depth = high - low
            block_product(scores, low, width, 1, values, value, dv, sums, total, dv, depth, True)


@compiled
def _weigh_biased(
    scores: Any, at: int, width: int, biases: Any, bias_at: int, bias_width: int
) -> None:
    """Makes weights of [ROWS, COLUMNS] scores with a bias.

    Args:
        scores: where they are.
        at: where they begin.
        width: the distance of their rows.
        biases: where the bias is.
        bias_at: where it begins.
        bias_width: the distance of its rows.
    """
    use_wide_vectors()
    for row in range(ROWS):
        first = bias_at + row * bias_width
        # Columns behind the last key have no bias, nor have rows that no query is in.
        number = max(min(COLUMNS, biases.size - first), 0)
        biased_silu_pass(scores, at + row * width, number, biases, first)


@compiled
def _mask_block(
    scores: Any, at: int, width: int, firsts: Any, ends: Any, bounds_at: int, key: int
) -> None:
    """Clears what is not read of [ROWS, COLUMNS] weights, the first of which are of a key.

    Args:
        scores: where they are.
        at: where they begin.
        width: the distance of their rows.
        firsts: the first key that a row reads.
        ends: the key behind the last one that it reads.
        bounds_at: where the rows begin in firsts and ends.
        key: that of the first column.
    """
    use_wide_vectors()
    for row in range(ROWS):
        bounds = np.uintp(bounds_at + row)
        # Of 32 bits, as weights are, so that vectors are compared.
        first = np.int32(min(max(firsts[bounds] - key, 0), COLUMNS))
        end = np.int32(min(max(ends[bounds] - key, 0), COLUMNS))
        for column in range(COLUMNS):
            place, number = np.uintp(at + row * width + column), np.int32(column)
            scores[place] = scores[place] if first <= number < end else np.float32(0.0)


@compiled
def _attend_alone(head: int, span: Any, step: Step, constants: Constants, sums: Floats) -> None:
    """Adds what candidates read of themselves, where each is a group of its own."""
    use_wide_vectors()
    q, k, v = step.q, step.k, step.v
    q_array, k_array, v_array = q.array, k.array, v.array
    size = padded(constants.dv)
    place = span.num_queries * size
    for candidate in range(span.num_candidates):
        row = span.first_candidate + candidate
        q_at = (span.first_candidate_query + candidate) * q.row + head * q.head
        score = _dot(q_array, q_at, k_array, row * k.row + head * k.head, constants.dqk)
        weight = silu(np.float32(score * constants.score_factor))
        v_at = row * v.row + head * v.head
        for i in range(constants.dv):
            sums[np.uintp(place + i)] += weight * as_float(v_array, v_at + i)
        place += size


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")
def _dot(a: Any, a_at: int, b: Any, b_at: int, n: int) -> Any:
    """Product of two vectors, whose sum may be taken in any order."""
    total = np.float32(0.0)
    for i in range(n):
        total += as_float(a, a_at + i) * as_float(b, b_at + i)
    return total


def _kernel(sources: int) -> Any:
    """Makes the kernel; see below for `sources`."""

    def attend(
        first_head: int,
        end_head: int,
        spans: npt.NDArray[np.void],
        step: Step,
        constants: Constants,
        scratch: Scratch,
        bias: Bias,
    ) -> int:
        use_wide_vectors()
        for place in range(spans.size):
            span = spans[place]
            num_strips = list_queries(span, constants, scratch)
            for head in range(first_head, end_head):
                _attend_span(head, span, num_strips, step, constants, scratch, bias)
        return sources

    return njit(cache=True, nogil=True)(attend)


def _digest() -> int:
    """Stands for the other files that are compiled into the kernel."""
    names = ("silu_intervals.py", "silu_memory.py", "silu_tile.py", "silu_vectors.py")
    text = b"".join((Path(__file__).parent / name).read_bytes() for name in names)
    return int.from_bytes(hashlib.sha256(text).digest()[:7])


# What is compiled is kept on disk until this file changes. That the digest is a constant of the
# kernel makes it so for the other files too.
_attend = _kernel(_digest())


def attend_heads(
    first_head: int,
    end_head: int,
    spans: npt.NDArray[np.void],
    step: Step,
    constants: Constants,
    scratch: Scratch,
    bias: Bias,
) -> None:
    """Writes what the queries of all spans read, for heads first_head .. end_head - 1.

    Args:
        first_head: the first head.
        end_head: the head behind the last.
        spans: `SPAN` [spans].
        step: what is read and written.
        constants: of the model.
        scratch: enough for the span with the most queries.
        bias: added to scores; with one there is a single span, and it has no candidates.
    """
    _attend(first_head, end_head, spans, step, constants, scratch, bias)

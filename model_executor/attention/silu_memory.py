"""Where compiled SiLU attention reads, works and writes, and the copies between these places.

Tensors come as flat memory and distances, so that one compiled version fits every layout. Whatever
they hold, the work is done in float32: a bfloat16 is widened where it is read, and only what is
written at the end is rounded.

An access to an array that is a member of a tuple counts a reference, which takes as long as copying
a vector: functions get at the arrays they need once, before their loops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model_executor.attention.silu_tile import COLUMNS, ROWS, compiled, prefetch

Floats = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

SPAN_FIELDS = (
    "start",  # Rows of the context in pages ...
    "first_block",  # ... and where their block table begins among all.
    "num_rows",  # Rows of the context in the step ...
    "first_row",  # ... and where they begin in k and v.
    "num_queries",  # Context rows that are queries ...
    "first_query",  # ... where they begin in q ...
    "first_position",  # ... and in the context.
    "num_candidates",
    "first_candidate",  # Where they begin in k and v ...
    "first_candidate_query",  # ... and in q.
)
SPAN = np.dtype([(name, np.int64) for name in SPAN_FIELDS])
"""A sequence, or some queries of one."""

_AHEAD = 32
"""So many rows ahead memory is asked for: rows lie too far apart for the processor to foresee."""
_CACHE_LINE = 64
_ONE = np.float32(1.0)


class Rows(NamedTuple):
    """Vectors of a step's rows, one for each head."""

    array: npt.NDArray[Any]
    """Flat float32, or the bits of bfloat16 as uint16."""
    row: int
    """Numbers from one row to the next."""
    head: int
    """Numbers from one head to the next."""


class Pages(NamedTuple):
    """Vectors of rows in pages, likewise."""

    array: npt.NDArray[Any]
    page: int
    row: int
    head: int


class Step(NamedTuple):
    """What is read and written."""

    q: Rows
    k: Rows
    v: Rows
    page_k: Pages
    page_v: Pages
    block_tables: Int64Array
    """Of all sequences, one behind another."""
    block_tokens: int
    attended: Rows


class Constants(NamedTuple):
    """Of a model, and the size of a tile."""

    heads: int
    dqk: int
    dv: int
    window: int
    num_open_rows: int
    group_size: int
    score_factor: np.float32
    """Of a product of query and key, for `silu_pass`."""
    weight_factor: np.float32
    """Of what `silu_pass` leaves, for a weight."""
    keys_per_tile: int
    """A multiple of `COLUMNS`."""


class Bias(NamedTuple):
    """What is added to scores of context rows."""

    array: Floats
    """Flat [queries, num_keys]."""
    num_keys: int
    """0 for no bias."""
    first_key: int
    """Key of the first column."""


class Scratch(NamedTuple):
    """Memory of one thread, flat; `ROWS` queries are a strip."""

    rows: Int64Array
    """Which row of q a query is, [strips, ROWS]; -1 where a strip is not full."""
    firsts: Int64Array
    """First key that each reads, [2, strips, ROWS]: of the context, and of candidates."""
    ends: Int64Array
    """The key behind the last one that it reads, likewise."""
    lows: Int64Array
    """First key that any query of a strip reads, [2, strips]."""
    highs: Int64Array
    """The key behind the last one that any reads, likewise."""
    all_from: Int64Array
    """What all queries of a strip read begins here ..."""
    all_to: Int64Array
    """... and ends here, likewise."""
    queries: Floats
    """[strips, dqk, ROWS]"""
    sums: Floats
    """What each has read so far, [strips, ROWS, dv padded]."""
    keys: Floats
    """Of a tile, [keys_per_tile / COLUMNS, dqk, COLUMNS]."""
    values: Floats
    """Of a tile, [keys_per_tile, dv padded]."""
    scores: Floats
    """Of a strip and a tile, [ROWS, keys_per_tile]."""


def make_scratch(num_strips: int, dqk: int, dv: int, keys_per_tile: int) -> Scratch:
    """Memory for spans of up to that many strips."""
    queries, keys, value_size = num_strips * ROWS, keys_per_tile, -(-dv // COLUMNS) * COLUMNS
    sizes = queries * dqk, queries * value_size, keys * dqk, keys * value_size, ROWS * keys
    # Of floats by torch, which begins at a cache line. Zeros, since columns that no key fills are
    # multiplied as well, if for nothing: what lay there could be denormal numbers, which are slow.
    floats = (torch.zeros(size).numpy() for size in sizes)
    of_queries, of_strips = (
        np.zeros((3, 2 * queries), np.int64),
        np.zeros((4, 2 * num_strips), np.int64),
    )
    return Scratch(*of_queries, *of_strips, *floats)


@compiled
def padded(number: int) -> int:
    """The next multiple of `COLUMNS`."""
    return -(-number // COLUMNS) * COLUMNS


@compiled
def as_float(array: Any, place: int) -> Any:
    """A number of an array, as float32."""
    # Unsigned: a signed place would be looked at whether it counts from the end.
    number = array[np.uintp(place)]
    # Decided when this is compiled. A bfloat16 is the upper half of a float's bits.
    if array.itemsize == 2:
        return np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return np.float32(number)


@compiled
def pack_strip(
    strip: int,
    rows: Int64Array,
    source: Any,
    first_at: int,
    distance: int,
    queries: Floats,
    dqk: int,
    factor: Any,
) -> None:
    """Copies a strip's queries to where the numbers of one dimension lie side by side.

    Args:
        strip: which one.
        rows: which row each query is.
        source: their memory.
        first_at: where the head's numbers of row 0 begin.
        distance: numbers from one row to the next.
        queries: where they are put.
        dqk: numbers of a query.
        factor: of all numbers.
    """
    for place in range(ROWS):
        row = rows[np.uintp(strip * ROWS + place)]
        target = strip * ROWS * dqk + place
        if row >= 0:
            at = first_at + row * distance
            _prefetch(source, at + _AHEAD * distance, dqk)
            _copy(source, at, queries, target, ROWS, dqk, factor)
        else:
            queries[target : target + dqk * ROWS : ROWS] = 0


@compiled
def pack_tile(
    head: int,
    span: Any,
    first: int,
    end: int,
    own: bool,
    step: Step,
    constants: Constants,
    scratch: Scratch,
) -> None:
    """Copies keys first .. end - 1 and their values: the context's, or the candidates' if `own`.

    Keys go to panels of `COLUMNS`, in which the numbers of one dimension lie side by side.
    """
    k, v, page_k, page_v = step.k, step.v, step.page_k, step.page_v
    k_array, v_array, page_k_array, page_v_array = k.array, v.array, page_k.array, page_v.array
    keys, values, tables = scratch.keys, scratch.values, step.block_tables
    dqk, dv, value_size = constants.dqk, constants.dv, padded(constants.dv)
    first_row = span.first_candidate if own else span.first_row - span.start
    for key in range(first, end):
        column = key - first
        key_place = column // COLUMNS * COLUMNS * dqk + column % COLUMNS
        value_place = column * value_size
        if own or key >= span.start:
            row = first_row + key
            _prefetch(k_array, (row + _AHEAD) * k.row + head * k.head, dqk)
            _prefetch(v_array, (row + _AHEAD) * v.row + head * v.head, dv)
            at = row * k.row + head * k.head
            _copy(k_array, at, keys, key_place, COLUMNS, dqk, _ONE)
            at = row * v.row + head * v.head
            _copy(v_array, at, values, value_place, 1, dv, _ONE)
        else:
            ahead = min(key + _AHEAD, span.start - 1)
            page = tables[span.first_block + ahead // step.block_tokens]
            row = ahead % step.block_tokens
            _prefetch(page_k_array, _place_in_page(page_k, page, row, head), dqk)
            _prefetch(page_v_array, _place_in_page(page_v, page, row, head), dv)
            page = tables[span.first_block + key // step.block_tokens]
            row = key % step.block_tokens
            at = _place_in_page(page_k, page, row, head)
            _copy(page_k_array, at, keys, key_place, COLUMNS, dqk, _ONE)
            at = _place_in_page(page_v, page, row, head)
            _copy(page_v_array, at, values, value_place, 1, dv, _ONE)
    # Weights are 0 from here on, and so must values be: what lay there may be no number.
    values[(end - first) * value_size : padded(end - first) * value_size] = 0


@compiled
def write_sums(
    head: int, num_strips: int, attended: Rows, constants: Constants, scratch: Scratch
) -> None:
    """Writes what queries have read to their rows."""
    rows, sums, target = scratch.rows, scratch.sums, attended.array
    size = padded(constants.dv)
    for place in range(num_strips * ROWS):
        if rows[place] < 0:
            continue
        at = rows[place] * attended.row + head * attended.head
        _prefetch(target, at + _AHEAD * attended.row, constants.dv)
        for i in range(constants.dv):
            number = np.float32(sums[np.uintp(place * size + i)] * constants.weight_factor)
            if target.itemsize == 2:
                # The nearest bfloat16, ties to even; what is no number stays none.
                bits = number.view(np.uint32)
                bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                target[np.uintp(at + i)] = bits >> np.uint32(16)
            else:
                target[np.uintp(at + i)] = number


@compiled
def _place_in_page(pages: Pages, page: int, row: int, head: int) -> int:
    return page * pages.page + row * pages.row + head * pages.head


@compiled
def _prefetch(array: Any, at: int, n: int) -> None:
    """Brings a vector nearer."""
    for i in range(0, n, _CACHE_LINE // array.itemsize):
        prefetch(array, at + i)


@compiled
def _copy(
    source: Any, source_at: int, target: Floats, target_at: int, step: int, n: int, factor: Any
) -> None:
    """Copies n numbers that lie side by side to places that are `step` apart."""
    for i in range(n):
        target[np.uintp(target_at + i * step)] = as_float(source, source_at + i) * factor

"""HSTU attention in one Triton kernel that reads K and V from pages as they lie.

A query reads an interval of its context's rows, whatever the rule (`silu_intervals.interval_of`),
and a candidate an interval of the step's own rows besides: its group up to itself. A program works
on a tile of queries of one sequence and one head; SiLU needs no normalisation over a row, so that
tiles of keys are summed as they come, in fp32. Tiling follows FlashAttention (arXiv 2205.14135),
the block tables PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from model_executor.attention.backend import AttentionShape, PairBias, TabledBias
from model_executor.attention.rule import AttentionRule
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch, to_device
from model_executor.step import Int64Array

_HEIGHT = 64
"""Queries of a tile."""
_LEAST_SIDE = 16
"""Shortest side of a matrix that `tl.dot` takes."""
_WIDEST_HEAD = 256


def refusal(shape: AttentionShape, device: torch.device) -> str | None:
    """Why a model cannot be computed by the kernel, or None."""
    if shape.rule.weights != "silu":
        return "computes SiLU attention, not softmax (torch does, and xformers)"
    if max(shape.dqk, shape.dv) > _WIDEST_HEAD:
        return f"takes heads of at most {_WIDEST_HEAD} numbers (torch takes any)"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "works on a CPU only in Triton's interpreter (TRITON_INTERPRET=1), which is slow"
    return None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the tiles of a step read; the same for all layers of one batch."""

    batch: weakref.ref[PagedBatch]
    tiles: Tensor
    """Of each tile, int64 [tiles, 5]: place of its block table, first context row that is read and
    the one behind the last, likewise of the step's own rows."""
    queries: Tensor
    """Of each query of a tile, int64 [7, tiles * height]: row of q or -1, first context row and
    the one behind the last, likewise of the step's own rows, position, place in the buckets."""
    tables: Tensor
    """Block tables of all sequences, int64 [blocks]."""
    buckets: Tensor | None
    """Time buckets of all sequences, int16 [sum of rows * context]; None = no bias."""


class TritonAttention:
    """See the module; `refusal` says for which models."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: PagedKV,
        layer: int,
        batch: PagedBatch,
        rule: AttentionRule,
        bias: PairBias | None = None,
    ) -> Tensor:
        """Attends a layer's queries: float [Q, H, dv]; see `AttentionBackend.attend`.

        Raises:
            TypeError: the bias does not have the parts that the kernel adds.
        """
        if bias is not None and not isinstance(bias, TabledBias):
            raise TypeError(f"bias: {type(bias).__name__} is no TabledBias")
        attended = v.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        if not len(attended):
            return attended
        plan = self._plan
        if plan is None or plan.batch() is not batch:
            plan = self._plan = _make_plan(batch, rule, bias)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        pages_k, pages_v = kv.k[:, layer], kv.v[:, layer]
        heads, dqk, dv = q.shape[1], q.shape[2], v.shape[2]
        widest = max(dqk, dv)
        # Without a bias the kernel reads none of these; it is given any tensor.
        by_position, by_time, buckets, last = q, q, plan.tables, 0
        if bias is not None and plan.buckets is not None:
            by_position, by_time, buckets = bias.position_weight, bias.time_weight, plan.buckets
            last = len(by_position) // 2
        _attend[(len(plan.tiles), heads)](
            q, k, v, pages_k, pages_v, attended,
            plan.tiles, plan.queries, plan.tables, by_position, by_time, buckets,
            pages_k.stride(0), pages_v.stride(0), plan.queries.shape[1], last,
            rule.scale, float(rule.normaliser),
            heads, dqk, dv, kv.k.shape[2], plan.buckets is not None,
            _HEIGHT, 32 if widest > 128 else 64, _side(dqk), _side(dv),
        )  # fmt: skip
        return attended


def _side(width: int) -> int:
    return max(_LEAST_SIDE, int(triton.next_power_of_2(width)))


def _make_plan(batch: PagedBatch, rule: AttentionRule, bias: TabledBias | None) -> _Plan:
    """Works out on the host, for all queries at once, what they read."""
    shares = np.array(
        [
            (
                one.num_queries,
                one.num_candidates,
                one.first_query,
                one.first_candidate_query,
                one.first_candidate,
                one.start,
                one.context_len,
                len(one.block_table),
            )
            for one in batch.sequences
        ],
        dtype=np.int64,
    )
    tiles, queries = _cut(shares, rule)
    device = batch.positions.device
    numbers = to_device(np.concatenate([tiles.reshape(-1), queries.reshape(-1)]), device)
    tables = [one.block_table for one in batch.sequences]
    return _Plan(
        batch=weakref.ref(batch),
        tiles=numbers[: tiles.size].view(tiles.shape),
        queries=numbers[tiles.size :].view(queries.shape),
        tables=tables[0] if len(tables) == 1 else torch.cat(tables),
        buckets=None if bias is None else torch.cat([one.reshape(-1) for one in bias.buckets]),
    )


def _cut(shares: Int64Array, rule: AttentionRule) -> tuple[Int64Array, Int64Array]:
    """`_Plan.tiles` and `_Plan.queries` of sequences, int64 [sequences, 8] as `_make_plan` has."""
    num_queries, num_candidates, *_, num_blocks = shares.T
    numbers = num_queries + num_candidates
    num_tiles = -(-numbers // _HEIGHT)
    sequence = np.repeat(np.arange(len(shares)), num_tiles)
    first_tile = np.cumsum(num_tiles) - num_tiles
    place = (np.arange(len(sequence)) - first_tile[sequence])[:, None] * _HEIGHT
    place = place + np.arange(_HEIGHT)
    of_tile = shares[sequence][:, :, None].transpose(1, 0, 2)
    queries, _, first_query, first_candidate_query, first_candidate, start, length, _ = of_tile
    # A query too many repeats the last one: it reads no more for that, and is not written.
    is_query = place < numbers[sequence][:, None]
    place = np.minimum(place, numbers[sequence][:, None] - 1)
    candidate = place - queries
    is_context = candidate < 0
    row = np.where(is_context, first_query + place, first_candidate_query + candidate)
    position = np.where(is_context, length - queries + place, length)
    first, end = _intervals(position, length, rule)
    own_first = np.where(is_context, 0, first_candidate + candidate - candidate % rule.group_size)
    own_end = np.where(is_context, 0, first_candidate + candidate + 1)
    pairs = (shares[:, 6] - shares[:, 5]) * shares[:, 6]
    first_pair = (np.cumsum(pairs) - pairs)[sequence][:, None]
    bucket = np.where(is_context, first_pair + (position - start) * length, 0)
    first_block = np.cumsum(num_blocks) - num_blocks
    # What a context query has of the step's own rows is nothing, and does not widen the tile.
    lowest_own = np.where(is_context, np.iinfo(np.int64).max, own_first).min(axis=1)
    highest_own = own_end.max(axis=1)
    tiles = np.stack(
        [
            first_block[sequence],
            first.min(axis=1),
            end.max(axis=1),
            np.minimum(lowest_own, highest_own),
            highest_own,
        ],
        axis=1,
    )
    rows = np.where(is_query, row, -1)
    listed = np.stack([rows, first, end, own_first, own_end, position, bucket])
    return tiles, listed.reshape(len(listed), -1)


def _intervals(
    position: Int64Array, length: Int64Array, rule: AttentionRule
) -> tuple[Int64Array, Int64Array]:
    """`context_mask` as intervals: the first row that is read, and the row behind the last."""
    first = np.zeros_like(position)
    if rule.window:
        # Open rows share one place; whoever reaches it reads all of them.
        shift = max(0, rule.num_open_rows - 1)
        reach = position - shift - rule.window
        first = np.where(reach > 0, reach + shift, 0)
    is_open = position < rule.num_open_rows
    end = np.where(is_open, length, np.minimum(position + 1, length))
    return np.where(is_open, 0, first), end


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(summed: Any, scores: Any, reads: Any, values: Any) -> Any:
    """Adds what a tile of keys contributes: SiLU(scores) where a query reads the key."""
    weights = tl.where(reads, scores / (1.0 + tl.exp(-scores)), 0.0)
    return tl.dot(weights.to(values.dtype), values, acc=summed, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    q: Any, k: Any, v: Any, pages_k: Any, pages_v: Any, out: Any,
    tiles: Any, queries: Any, tables: Any, position_weight: Any, time_weight: Any, buckets: Any,
    page_k: Any, page_v: Any, num_places: Any, last_position: Any,
    scale: Any, normaliser: Any,
    heads: tl.constexpr, dqk: tl.constexpr, dv: tl.constexpr, block_tokens: tl.constexpr,
    has_bias: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, side_k: tl.constexpr, side_v: tl.constexpr,
) -> None:  # fmt: skip
    """One program attends one tile of queries for one head."""
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = queries + tile * height + tl.arange(0, height)
    row = tl.load(place)
    first, end = tl.load(place + num_places), tl.load(place + 2 * num_places)
    own_first, own_end = tl.load(place + 3 * num_places), tl.load(place + 4 * num_places)
    position, bucket = tl.load(place + 5 * num_places), tl.load(place + 6 * num_places)
    table = tables + tl.load(tiles + tile * 5)
    column_k, column_v = tl.arange(0, side_k), tl.arange(0, side_v)
    in_k, in_v = column_k < dqk, column_v < dv
    at_q = q + (row * heads + head)[:, None] * dqk + column_k[None, :]
    query = tl.load(at_q, mask=(row >= 0)[:, None] & in_k[None, :], other=0.0)
    summed = tl.zeros((height, side_v), dtype=tl.float32)
    high = tl.load(tiles + tile * 5 + 2)
    for low in range(tl.load(tiles + tile * 5 + 1), high, width):
        key = low + tl.arange(0, width)
        exists = key < high
        page = tl.load(table + key // block_tokens, mask=exists, other=0)
        token = (key % block_tokens) * heads + head
        # What is behind the end may be memory that nobody wrote, with NaN in it: it is not read.
        at_k = pages_k + (page * page_k + token * dqk)[None, :] + column_k[:, None]
        keys = tl.load(at_k, mask=in_k[:, None] & exists[None, :], other=0.0)
        at_v = pages_v + (page * page_v + token * dv)[:, None] + column_v[None, :]
        values = tl.load(at_v, mask=exists[:, None] & in_v[None, :], other=0.0)
        reads = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        if has_bias:
            at = bucket[:, None] + key[None, :]
            by_time = time_weight + tl.load(buckets + at, mask=reads, other=0).to(tl.int64)
            by_position = position_weight + key[None, :] - position[:, None] + last_position
            scores += tl.load(by_position, mask=reads, other=0.0).to(tl.float32)
            scores += tl.load(by_time, mask=reads, other=0.0).to(tl.float32)
        summed = _add_tile(summed, scores, reads, values)
    own_high = tl.load(tiles + tile * 5 + 4)
    for low in range(tl.load(tiles + tile * 5 + 3), own_high, width):
        key = low + tl.arange(0, width)
        exists = key < own_high
        token = key * heads + head
        at_k = k + (token * dqk)[None, :] + column_k[:, None]
        keys = tl.load(at_k, mask=in_k[:, None] & exists[None, :], other=0.0)
        at_v = v + (token * dv)[:, None] + column_v[None, :]
        values = tl.load(at_v, mask=exists[:, None] & in_v[None, :], other=0.0)
        reads = (key[None, :] >= own_first[:, None]) & (key[None, :] < own_end[:, None])
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        summed = _add_tile(summed, scores, reads, values)
    at_out = out + (row * heads + head)[:, None] * dv + column_v[None, :]
    result = (summed / normaliser).to(out.dtype.element_ty)
    tl.store(at_out, result, mask=(row >= 0)[:, None] & in_v[None, :])

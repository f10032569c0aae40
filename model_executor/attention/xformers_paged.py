"""Softmax attention by xformers, over the pool's pages as they lie.

xformers (Lefaudeux et al., https://github.com/facebookresearch/xformers) describes paged keys by
a bias: `PagedBlockDiagonalCausalWithOffsetPaddedKeysMask` holds a block table and the page size,
and the keys of all pages are one tensor [1, tokens, H, d] with one stride from token to token. A
page of ours holds the K and then the V of all layers, so that stride ends at a layer's border. What
makes the two agree is to count in layers' blocks and not in pages:

    our page      |             page 0              |             page 1              | ...
    their pages   | K l0 | K l1 | ... | V l0 | V l1 | K l0 | K l1 | ...

A page is `blocks_per_page` of their pages; the block table is multiplied by that number, and the
tensors of a layer's keys and values begin at its first block in page 0. Nothing is copied, and all
layers share one bias.

The kernel is their Triton one (split-K, after Dao et al., "Flash-Decoding", 2023): the only one of
theirs that takes pages as small as ours. Its causal form wants sequences with the same number of
queries, 16 at most. Context queries are therefore cut into tiles that end where their sequence
ends; rows of a first tile that begin before its queries repeat the first one, and are not read.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
from xformers.ops.fmha.triton_splitk import FwOp

from model_executor.attention.backend import AttentionShape, PairBias
from model_executor.attention.rule import AttentionRule
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch, to_device

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
KEYS_PER_TILE = (64, 32, 16)
"""Keys that the kernel reads at once; a page holds a multiple of one of them."""
QUERIES_PER_TILE = 16
"""The most that the kernel's causal form takes of a sequence."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Triton runs kernels in Python on the CPU (TRITON_INTERPRET=1): for tests."""

Int64Array = npt.NDArray[np.int64]


def refusal(shape: AttentionShape, device: torch.device) -> str | None:
    """Why this backend cannot serve a model on a device; None = it can."""
    rule = shape.rule
    if rule.weights != "softmax":
        return "computes softmax attention, and this model's weights are SiLU"
    if rule.window or rule.num_open_rows or shape.candidates_in_sequence:
        return "computes causal attention of context rows, and this model's mask is another one"
    if shape.dqk != shape.dv or shape.dqk not in HEAD_DIMS:
        known = ", ".join(str(dim) for dim in HEAD_DIMS)
        return f"takes dqk = dv of {known}; this model has dqk {shape.dqk} and dv {shape.dv}"
    if device.type == "cpu" and not INTERPRETED:
        return "works on cuda (on cpu only for tests, in Triton's interpreter: TRITON_INTERPRET=1)"
    dtypes = _DTYPES[device.type]
    if shape.dtype not in dtypes:
        known = " or ".join(_name(dtype) for dtype in dtypes)
        return f"computes in {known} on {device.type}, not in {_name(shape.dtype)} (dtype)"
    if shape.block_tokens % KEYS_PER_TILE[-1]:
        return f"needs block_tokens in multiples of {KEYS_PER_TILE[-1]}, not {shape.block_tokens}"
    block_bytes = shape.block_tokens * shape.num_heads * shape.dqk * shape.dtype.itemsize
    if shape.page_bytes % block_bytes:
        return (
            f"needs pages of whole layers: {shape.page_bytes} bytes are no multiple of the "
            f"{block_bytes} that K of one layer takes; block_tokens of {2 * shape.block_tokens} "
            "or more makes a block larger than a row"
        )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {
    # In float32 the kernel would multiply in tf32, which keeps 10 bits.
    "cuda": (torch.bfloat16, torch.float16),
    # The interpreter multiplies bfloat16 as if it were integers.
    "cpu": (torch.float32, torch.float16),
}


def _operator(block_tokens: int) -> type[FwOp]:
    """Their operator, with the most keys at once that a page is a multiple of."""
    keys = next(number for number in KEYS_PER_TILE if not block_tokens % number)
    settings: dict[str, Any] = {"BLOCK_N": keys}
    if INTERPRETED:
        settings["SUPPORTED_DEVICES"] = {"cpu", "cuda"}
        settings["SUPPORTED_DTYPES"] = {*FwOp.SUPPORTED_DTYPES, torch.float32}
    return type(f"PagedSplitK{keys}", (FwOp,), settings)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of a batch share."""

    batch: weakref.ref[PagedBatch]
    bias: PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    rows: Tensor
    """Query of each row of the tiles, int64 [tiles * height]."""
    places: Tensor
    """Where each query is among the rows of the tiles, int64 [Q]."""


class XFormersAttention:
    """Causal softmax attention of context rows; see the module for how the pages are read."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._operators: dict[int, type[FwOp]] = {}

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
            ValueError: there are candidates among the rows, or a bias, or pages are not whole
                layers.
        """
        if bias is not None or (len(q) and any(one.num_candidates for one in batch.sequences)):
            raise ValueError("attention_backend: 'xformers' takes no pair bias and no candidates")
        if not len(q):
            return v.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        tokens = kv.k.shape[2]
        plan = self._plan
        if plan is None or plan.batch() is not batch:
            self._plan = plan = _make_plan(batch, tokens, _blocks_per_page(kv))
        operator = self._operators.get(tokens)
        if operator is None:
            operator = self._operators[tokens] = _operator(tokens)
        attended: Tensor = fmha.memory_efficient_attention_forward(
            q.index_select(0, plan.rows).unsqueeze(0),
            _layer_rows(kv.k, layer),
            _layer_rows(kv.v, layer),
            attn_bias=plan.bias,
            scale=rule.scale,
            op=operator,
        )
        return attended[0].index_select(0, plan.places)


def _blocks_per_page(kv: PagedKV) -> int:
    """Their pages from one of our pages to the next.

    Raises:
        ValueError: it is no whole number, or not the same for K and V.
    """
    block = kv.k[0, 0].numel()
    number, rest = divmod(kv.k.stride(0), block)
    if rest or kv.v.shape != kv.k.shape or kv.v.stride() != kv.k.stride():
        raise ValueError(
            f"attention_backend: 'xformers' needs K and V of one shape, in pages of whole layers; "
            f"K {tuple(kv.k.shape)} has strides {kv.k.stride()}, "
            f"V {tuple(kv.v.shape)} has {kv.v.stride()}"
        )
    return number


def _layer_rows(pages: Tensor, layer: int) -> Tensor:
    """All memory from a layer's block in page 0 to its block in the last page: [1, n, H, d].

    Args:
        pages: K or V, [num_pages, layers, block_tokens, H, d].
        layer: which.
    """
    num_pages, _, tokens, heads, width = pages.shape
    row = heads * width
    num_rows = (num_pages - 1) * pages.stride(0) // row + tokens
    offset = pages.storage_offset() + layer * tokens * row
    return pages.as_strided((1, num_rows, heads, width), (num_rows * row, row, width, 1), offset)


def _make_plan(batch: PagedBatch, block_tokens: int, blocks_per_page: int) -> _Plan:
    """Cuts a batch's context queries into tiles, the longest block table as wide as all."""
    sequences = batch.sequences
    device = sequences[0].block_table.device
    numbers = np.array(
        [[one.num_queries, one.first_query, one.context_len] for one in sequences], dtype=np.int64
    )
    blocks = np.array([len(one.block_table) for one in sequences])
    height = 1 if numbers[:, 0].max() == 1 else QUERIES_PER_TILE
    owners, lengths, rows, places = _cut(numbers, height)
    # The kernel is compiled for each number of sequences and each width: few of both are used.
    num_tiles = _bucket(len(owners))
    width = _bucket(-(-int(lengths.max()) // block_tokens))
    index = np.zeros((num_tiles, width), dtype=np.int64)
    columns = np.arange(width)
    first_blocks = np.concatenate([[0], np.cumsum(blocks)[:-1]])
    # Columns behind a sequence's blocks are not read; they name its last block.
    index[: len(owners)] = first_blocks[owners, None] + np.minimum(
        columns, blocks[owners, None] - 1
    )
    tables = torch.cat([one.block_table for one in sequences])
    padded = np.zeros(num_tiles * height, dtype=np.int64)
    padded[: len(rows)] = rows
    on_device = to_device(np.concatenate([index.ravel(), padded, places]), device)
    tiles_blocks, row_index, place_index = torch.split_with_sizes(
        on_device, (index.size, len(padded), len(places))
    )
    block_tables = tables.index_select(0, tiles_blocks).mul_(blocks_per_page).to(torch.int32)
    bias = PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[height] * num_tiles,
        kv_seqlen=[*lengths.tolist(), *[0] * (num_tiles - len(owners))],
        block_tables=block_tables.view(num_tiles, width),
        page_size=block_tokens,
        device=device,
    )
    return _Plan(weakref.ref(batch), bias, row_index, place_index)


def _cut(numbers: Int64Array, height: int) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Tiles of `height` queries, the last of each sequence ending with it.

    Args:
        numbers: queries, first query among the rows of q, rows of the context, [sequences, 3].
        height: queries of a tile.

    Returns:
        Sequence of each tile; rows of the context up to its end; query of each row of the tiles,
        [tiles * height]; row of the tiles of each query, in the order of q.
    """
    num_queries, first_query, context_len = numbers.T
    num_tiles = -(-num_queries // height)
    owners = np.repeat(np.arange(len(numbers)), num_tiles)
    first_tiles = np.cumsum(num_tiles) - num_tiles
    # Of how many queries behind its own ones a tile knows nothing.
    behind = (num_tiles[owners] - 1 - (np.arange(len(owners)) - first_tiles[owners])) * height
    lengths = context_len[owners] - behind
    last = num_queries[owners] - behind
    within = last[:, None] - height + np.arange(height)
    rows = first_query[owners, None] + np.maximum(within, 0)
    is_query = (within >= 0).ravel()
    places = np.empty(int(num_queries.sum()), dtype=np.int64)
    # Without candidates the context queries are all queries, in their order.
    places[rows.ravel()[is_query]] = np.flatnonzero(is_query)
    return owners, lengths, rows.ravel(), places


def _bucket(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()

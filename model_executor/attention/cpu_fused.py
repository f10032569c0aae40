"""The fast backend of a CPU: compiled SiLU attention, and torch's own softmax attention."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from model_executor.attention.backend import PairBias
from model_executor.attention.rule import AttentionRule, candidate_mask, context_mask
from model_executor.attention.silu_intervals import interval_of
from model_executor.attention.silu_kernel import attend_heads
from model_executor.attention.silu_memory import (
    SPAN,
    Bias,
    Constants,
    Int64Array,
    Pages,
    Rows,
    Scratch,
    Step,
    make_scratch,
)
from model_executor.attention.silu_tile import COLUMNS, ROWS
from model_executor.attention.silu_vectors import SCORE_FACTOR, WEIGHT_FACTOR
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch, PagedSequence

KEYS_PER_TILE = 128
"""Keys, values and scores of a tile leave some room in a first cache of 48 KiB. On one core with
AVX-512, causal, 2,048 tokens, 4 heads of 32: 32 keys take 8 % longer, 64 to 256 the same within
2 %, 384 keys 3 % longer."""

_NO_BIAS = Bias(np.zeros(0, dtype=np.float32), num_keys=0, first_key=0)
_BIAS_NUMBERS = 1 << 20
"""Numbers of a bias that are made at once (4 MiB): what bounds its memory for long histories."""
_PAIRS_PER_THREAD = 1 << 18
"""Query-key pairs, heads counted, that are worth a thread (about 0.3 ms of work)."""


class CpuFusedAttention:
    """SiLU attention by tiles that stay in the cache; softmax attention sequence by sequence.

    SiLU attention works in float32 whatever the tensors hold, so results in bfloat16 are as good as
    their rounding. It shares the heads among as many threads as torch has. An instance keeps its
    memory for the layers of a step and therefore serves one caller at a time.
    """

    def __init__(self, keys_per_tile: int = KEYS_PER_TILE) -> None:
        """Sets the size of a tile.

        Raises:
            ValueError: it is no multiple of the columns that are computed at once.
        """
        if keys_per_tile < 1 or keys_per_tile % COLUMNS:
            raise ValueError(f"keys_per_tile: {keys_per_tile} is no multiple of {COLUMNS}")
        self._keys_per_tile = keys_per_tile
        self._plan: _Plan | None = None
        self._model: tuple[AttentionRule, tuple[int, int, int], Constants] | None = None
        self._pages: tuple[PagedKV, dict[int, tuple[Pages, Pages]]] | None = None
        self._scratches: list[Scratch] = []
        self._scratch_size = 0, 0, 0
        self._threads: ThreadPoolExecutor | None = None

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
        """Attends a layer's queries: float [Q, H, dv]; see `AttentionBackend.attend`."""
        heads, dqk, dv = q.shape[1], q.shape[2], v.shape[2]
        attended = v.new_empty(q.shape[0], heads, dv)
        if rule.weights == "softmax":
            _attend_softmax(attended, q, k, v, kv, layer, batch, rule)
            return attended
        plan = self._plan
        if plan is None or plan.batch() is not batch:
            # Nothing of a step outlives it: scratch memory goes when its batch does.
            self._plan = plan = _plan(batch, weakref.ref(batch, self._forget))
        constants = self._constants_of(rule, heads, dqk, dv)
        page_k, page_v = self._pages_of(kv, layer)
        step = Step(
            q=_rows(q),
            k=_rows(k),
            v=_rows(v),
            page_k=page_k,
            page_v=page_v,
            block_tables=plan.block_tables,
            block_tokens=kv.k.shape[2],
            attended=_rows(attended),
        )
        if bias is None:
            self._run(plan, step, constants, _NO_BIAS)
        else:
            for part, tile in _biased_parts(plan, constants, bias):
                self._run(part, step, constants, tile)
        return attended

    def _forget(self, batch: weakref.ref[PagedBatch]) -> None:
        if self._plan is not None and self._plan.batch is batch:
            self._plan = None
            self._scratches, self._scratch_size = [], (0, 0, 0)

    def _constants_of(self, rule: AttentionRule, heads: int, dqk: int, dv: int) -> Constants:
        """What stays the same from call to call."""
        known = self._model
        if known is None or known[0] is not rule or known[1] != (heads, dqk, dv):
            constants = Constants(
                heads=heads,
                dqk=dqk,
                dv=dv,
                window=rule.window,
                num_open_rows=rule.num_open_rows,
                group_size=rule.group_size,
                score_factor=np.float32(rule.scale * SCORE_FACTOR),
                weight_factor=np.float32(WEIGHT_FACTOR / rule.normaliser),
                keys_per_tile=self._keys_per_tile,
            )
            self._model = known = rule, (heads, dqk, dv), constants
        return known[2]

    def _pages_of(self, kv: PagedKV, layer: int) -> tuple[Pages, Pages]:
        """A layer's pages, which never move."""
        if self._pages is None or self._pages[0] is not kv:
            self._pages = kv, {}
        known = self._pages[1]
        if layer not in known:
            known[layer] = _as_pages(kv.k[:, layer]), _as_pages(kv.v[:, layer])
        return known[layer]

    def _run(self, plan: _Plan, step: Step, constants: Constants, bias: Bias) -> None:
        """Attends spans, by as many threads as torch has and the work is worth."""
        heads = constants.heads
        number = min(torch.get_num_threads(), heads, heads * plan.num_pairs // _PAIRS_PER_THREAD)
        scratches = self._take_scratches(max(1, number), plan.num_strips, constants)
        if len(scratches) == 1:
            attend_heads(0, heads, plan.spans, step, constants, scratches[0], bias)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(thread_name_prefix="attention")
        work = []
        for place, scratch in enumerate(scratches):
            first, end = (heads * one // number for one in (place, place + 1))
            work.append(
                self._threads.submit(
                    attend_heads, first, end, plan.spans, step, constants, scratch, bias
                )
            )
        for one in work:
            one.result()

    def _take_scratches(self, number: int, strips: int, constants: Constants) -> list[Scratch]:
        """Memory for some threads, which grows to what the largest span of any step needs."""
        needed, size = (strips, constants.dqk, constants.dv), self._scratch_size
        if needed[0] > size[0] or needed[1] > size[1] or needed[2] > size[2]:
            size = max(needed[0], size[0]), max(needed[1], size[1]), max(needed[2], size[2])
            self._scratch_size = size
            self._scratches = []
        while len(self._scratches) < number:
            self._scratches.append(make_scratch(*size, self._keys_per_tile))
        return self._scratches[:number]


def compile_kernels() -> None:
    """Compiles SiLU attention, or reads it from disk where an earlier process left it.

    It is kept beside the sources, or in the user's cache where that may not be written to
    (NUMBA_CACHE_DIR names another place).
    """
    attention = CpuFusedAttention()
    one = PagedSequence(
        first_row=0,
        num_rows=1,
        start=0,
        first_candidate=1,
        num_candidates=0,
        first_query=0,
        num_queries=1,
        first_candidate_query=1,
        block_table=torch.zeros(1, dtype=torch.int64),
        features=np.zeros((1, 1), dtype=np.int64),
    )
    places = torch.zeros(1, dtype=torch.int64)
    batch = PagedBatch(1, places, one.features, places, places, (one,))
    for dtype in (torch.float32, torch.bfloat16):
        row, pages = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, 1, dtype=dtype)
        kv = PagedKV(k=pages, v=pages)
        attention.attend(row, row, row, kv, 0, batch, AttentionRule("silu", scale=1.0))


@dataclass(frozen=True, slots=True)
class _Plan:
    """A batch, or some of its queries, as the kernel wants it: the same for all layers."""

    batch: weakref.ref[PagedBatch]
    spans: npt.NDArray[np.void]
    """`SPAN` [spans]."""
    block_tables: Int64Array
    num_strips: int
    """Of the span that has most."""
    num_pairs: int
    """Query-key pairs, about."""


def _plan(batch: PagedBatch, reference: weakref.ref[PagedBatch]) -> _Plan:
    spans, tables, first_block = [], [], 0
    for one in batch.sequences:
        tables.append(one.block_table.numpy())
        span = (
            one.start,
            first_block,
            one.num_rows,
            one.first_row,
            one.num_queries,
            one.first_query,
            one.context_len - one.num_queries,
            one.num_candidates,
            one.first_candidate,
            one.first_candidate_query,
        )
        spans.append(span)
        first_block += len(tables[-1])
    return _plan_of(reference, np.array(spans, dtype=SPAN), np.concatenate(tables))


def _plan_of(
    batch: weakref.ref[PagedBatch], spans: npt.NDArray[np.void], tables: Int64Array
) -> _Plan:
    queries = spans["num_queries"] + spans["num_candidates"]
    pairs = queries * (spans["start"] + spans["num_rows"])
    return _Plan(batch, spans, tables, -(-int(queries.max(initial=0)) // ROWS), int(pairs.sum()))


def _biased_parts(
    plan: _Plan, constants: Constants, bias: PairBias
) -> Iterator[tuple[_Plan, Bias]]:
    """Context rows with their bias, some at a time, and then candidates, which have none."""
    for place in range(len(plan.spans)):
        span = plan.spans[place : place + 1].copy()
        span["num_candidates"] = 0
        number, position, query = (
            int(span[name][0]) for name in ("num_queries", "first_position", "first_query")
        )
        length = position + number
        height = max(ROWS, _BIAS_NUMBERS // max(1, length))
        for first in range(position, length, height):
            end = min(first + height, length)
            low, high = interval_of.py_func(first, length, constants)
            high = max(high, interval_of.py_func(end - 1, length, constants)[1])
            added = bias(place, slice(first, end), slice(low, high)).float().contiguous()
            part = span.copy()
            part["num_queries"], part["first_position"] = end - first, first
            part["first_query"] = query + first - position
            tile = Bias(added.view(-1).numpy(), num_keys=high - low, first_key=low)
            yield _plan_of(plan.batch, part, plan.block_tables), tile
    candidates = plan.spans.copy()
    candidates["num_queries"] = 0
    yield _plan_of(plan.batch, candidates, plan.block_tables), _NO_BIAS


def _as_array(tensor: Tensor, extent: int) -> npt.NDArray[Any]:
    """A tensor's memory from its first number on; bfloat16, which NumPy lacks, as uint16."""
    flat = tensor.as_strided((extent,), (1,))
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def _rows(tensor: Tensor) -> Rows:
    """Of float [rows, H, d]."""
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    number, heads, width = tensor.shape
    row, head, _ = tensor.stride()
    extent = (number - 1) * row + (heads - 1) * head + width if number else 0
    return Rows(_as_array(tensor, extent), row, head)


def _as_pages(tensor: Tensor) -> Pages:
    """Of float [pages, block_tokens, H, d]."""
    page, row, head, _ = tensor.stride()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Pages(_as_array(tensor, last + 1), page, row, head)


def _attend_softmax(
    attended: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    layer: int,
    batch: PagedBatch,
    rule: AttentionRule,
) -> None:
    """Writes what queries read by softmax."""
    for one in batch.sequences:
        keys, values = k[one.first_row :][: one.num_rows], v[one.first_row :][: one.num_rows]
        if one.start:
            table = one.block_table[: -(-one.start // kv.k.shape[2])]
            held_keys, held_values = kv.gather(layer, table, one.start)
            keys, values = torch.cat([held_keys, keys]), torch.cat([held_values, values])
        positions = torch.arange(one.context_len)
        if one.num_queries:
            rows = slice(one.first_query, one.first_query + one.num_queries)
            allowed = context_mask(rule, positions[-one.num_queries :], positions)
            attended[rows] = _softmax_attention(q[rows], keys, values, allowed, rule.scale)
        if one.num_candidates:
            own = slice(one.first_candidate, one.first_candidate + one.num_candidates)
            keys, values = torch.cat([keys, k[own]]), torch.cat([values, v[own]])
            behind = torch.full((one.num_candidates,), one.context_len)
            among = candidate_mask(rule, torch.arange(one.num_candidates))
            allowed = torch.cat([context_mask(rule, behind, positions), among], dim=1)
            first = one.first_candidate_query
            rows = slice(first, first + one.num_candidates)
            attended[rows] = _softmax_attention(q[rows], keys, values, allowed, rule.scale)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Float [n, H, dv] of q [n, H, dqk], k [m, H, dqk], v [m, H, dv] and a mask [n, m]."""
    q, k, v = (one.transpose(0, 1).unsqueeze(0) for one in (q, k, v))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    return attended[0].transpose(0, 1)

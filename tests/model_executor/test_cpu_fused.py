"""The fast backend of a CPU against the slow one, and what it computes with against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_executor.attention import cpu_fused
from model_executor.attention.backend import PairBias
from model_executor.attention.cpu_fused import CpuFusedAttention
from model_executor.attention.rule import AttentionRule, context_mask
from model_executor.attention.silu_intervals import interval_of
from model_executor.attention.silu_memory import Constants
from model_executor.attention.silu_tile import COLUMNS
from model_executor.attention.silu_vectors import (
    SCORE_FACTOR,
    WEIGHT_FACTOR,
    biased_silu_pass,
    plain_silu_pass,
    silu_pass,
)
from model_executor.attention.torch_reference import TorchReferenceAttention
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch, PagedSequence

LAYER = 1
SMALL_TILE = COLUMNS
NORMALISER = 50


@dataclass(frozen=True)
class Lengths:
    """Of one sequence."""

    start: int
    num_rows: int
    num_candidates: int


@dataclass
class Case:
    """What a backend is called with, but for the rule."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv: PagedKV
    batch: PagedBatch

    def attend(
        self,
        backend: CpuFusedAttention | TorchReferenceAttention,
        rule: AttentionRule,
        bias: PairBias | None = None,
    ) -> Tensor:
        with torch.inference_mode():
            return backend.attend(self.q, self.k, self.v, self.kv, LAYER, self.batch, rule, bias)

    def narrowed(self, last_rows: bool) -> Case:
        batch, picked = self.batch.narrow(last_rows)
        return Case(self.q[picked], self.k, self.v, self.kv, batch)

    def widened(self) -> Case:
        """The same numbers as float32."""
        kv = PagedKV(k=self.kv.k.float(), v=self.kv.v.float())
        return Case(self.q.float(), self.k.float(), self.v.float(), kv, self.batch)


@dataclass(frozen=True)
class TableBias:
    """One table for each sequence."""

    tables: Sequence[Tensor]

    def __call__(self, sequence: int, queries: slice, keys: slice) -> Tensor:
        return self.tables[sequence][queries, keys]


def make_case(
    lengths: Sequence[Lengths],
    *,
    heads: int = 2,
    dqk: int = 5,
    dv: int = 3,
    block_tokens: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random rows; pages in random order, with NaN wherever no row is."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-(one.start + one.num_rows) // block_tokens) for one in lengths]
    num_pages = sum(blocks) + 3
    unused = torch.randperm(num_pages, generator=generator)
    page_k, page_v = (
        torch.full((num_pages, 2, block_tokens, heads, d), math.nan, dtype=dtype) for d in (dqk, dv)
    )
    kv = PagedKV(page_k, page_v)
    num_context_rows = sum(one.num_rows for one in lengths)
    num_rows = num_context_rows + sum(one.num_candidates for one in lengths)
    # As a model makes them: slices of the rows of one projection.
    widths = (heads * dv, heads * dv, heads * dqk, heads * dqk)
    projected = torch.randn(num_rows, sum(widths), generator=generator).to(dtype)
    _, v, q, k = projected.split(widths, dim=1)
    q, k, v = (one.unflatten(1, (heads, -1)) for one in (q, k, v))
    sequences: list[PagedSequence] = []
    first_row, first_candidate = 0, num_context_rows
    for one, num_blocks in zip(lengths, blocks, strict=True):
        table, unused = unused[:num_blocks], unused[num_blocks:]
        places = torch.arange(one.start + one.num_rows)
        own = slice(first_row, first_row + one.num_rows)
        for pages, new in ((kv.k, k[own]), (kv.v, v[own])):
            held = torch.randn(one.start, *new.shape[1:], generator=generator).to(dtype)
            where = table[places // block_tokens], LAYER, places % block_tokens
            pages[where] = torch.cat([held, new])
        sequences.append(
            PagedSequence(
                first_row=first_row,
                num_rows=one.num_rows,
                start=one.start,
                first_candidate=first_candidate,
                num_candidates=one.num_candidates,
                first_query=first_row,
                num_queries=one.num_rows,
                first_candidate_query=first_candidate,
                block_table=table,
                features=np.zeros((one.start + one.num_rows, 1), dtype=np.int64),
            )
        )
        first_row += one.num_rows
        first_candidate += one.num_candidates
    nothing = torch.zeros(0, dtype=torch.int64)
    features = np.zeros((num_rows, 1), dtype=np.int64)
    batch = PagedBatch(num_context_rows, nothing, features, nothing, nothing, tuple(sequences))
    return Case(q, k, v, kv, batch)


def make_bias(case: Case, seed: int = 0) -> TableBias:
    generator = torch.Generator().manual_seed(seed)
    lengths = [one.context_len for one in case.batch.sequences]
    return TableBias([torch.randn(length, length, generator=generator) for length in lengths])


def assert_close(got: Tensor, want: Tensor, relative: float = 1e-5) -> None:
    error = (got.float() - want).abs()
    assert not error.isnan().any()
    assert (error <= relative * want.abs().clamp_min(1.0)).all(), error.max()


shapes = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 4),
        "dqk": st.integers(1, 20),
        "dv": st.sampled_from([1, 3, 16, COLUMNS, COLUMNS + 1]),
        "block_tokens": st.integers(1, 20),
        "seed": st.integers(0, 1000),
    }
)
candidates = st.one_of(st.just(0), st.integers(1, 40))
sequences_of_a_step = st.lists(
    st.builds(Lengths, st.one_of(st.just(0), st.integers(0, 90)), st.integers(0, 90), candidates),
    min_size=1,
    max_size=4,
)
whole_sequences = st.lists(
    st.builds(Lengths, st.just(0), st.integers(1, 90), candidates), min_size=1, max_size=4
)


@st.composite
def rules(draw: st.DrawFn, num_open_rows: int = 0) -> AttentionRule:
    return AttentionRule(
        weights="silu",
        scale=draw(st.sampled_from([1.0, 0.25])),
        normaliser=NORMALISER,
        num_open_rows=num_open_rows,
        window=draw(st.one_of(st.just(0), st.integers(1, 80))),
        group_size=draw(st.sampled_from([1, 1, 2, 7, 40])),
    )


@settings(max_examples=60)
@given(
    shape=shapes,
    lengths=sequences_of_a_step,
    rule=rules(),
    tile=st.sampled_from([SMALL_TILE, 2 * SMALL_TILE, cpu_fused.KEYS_PER_TILE]),
    narrowed=st.sampled_from([None, None, False, True]),
    has_bias=st.booleans(),
)
def test_equals_the_reference(
    shape: dict[str, Any],
    lengths: list[Lengths],
    rule: AttentionRule,
    tile: int,
    narrowed: bool | None,
    has_bias: bool,
) -> None:
    case = make_case(lengths, **shape)
    bias = make_bias(case) if has_bias else None
    if narrowed is not None and all(one.num_rows for one in lengths):
        case = case.narrowed(narrowed)
    want = case.attend(TorchReferenceAttention(), rule, bias)
    assert_close(case.attend(CpuFusedAttention(tile), rule, bias), want)


@settings(max_examples=30)
@given(
    shape=shapes,
    lengths=whole_sequences,
    rule=st.integers(1, 20).flatmap(rules),
    narrowed=st.booleans(),
    has_bias=st.booleans(),
)
def test_open_rows_read_the_whole_context(
    shape: dict[str, Any],
    lengths: list[Lengths],
    rule: AttentionRule,
    narrowed: bool,
    has_bias: bool,
) -> None:
    case = make_case(lengths, **shape)
    bias = make_bias(case) if has_bias else None
    if narrowed:
        case = case.narrowed(True)
    want = case.attend(TorchReferenceAttention(), rule, bias)
    assert_close(case.attend(CpuFusedAttention(SMALL_TILE), rule, bias), want)


@settings(max_examples=20)
@given(shape=shapes, lengths=sequences_of_a_step, rule=rules(), has_bias=st.booleans())
def test_bfloat16_is_as_good_as_its_rounding(
    shape: dict[str, Any], lengths: list[Lengths], rule: AttentionRule, has_bias: bool
) -> None:
    case = make_case(lengths, **shape, dtype=torch.bfloat16)
    bias = make_bias(case) if has_bias else None
    got = case.attend(CpuFusedAttention(SMALL_TILE), rule, bias)
    want = case.widened().attend(TorchReferenceAttention(), rule, bias)
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).abs()
    assert (error <= 2**-8 * want.abs() + 1e-5).all()


@settings(max_examples=20)
@given(shape=shapes, lengths=sequences_of_a_step, window=st.sampled_from([0, 5, 60]))
def test_softmax_equals_the_reference(
    shape: dict[str, Any], lengths: list[Lengths], window: int
) -> None:
    case = make_case(lengths, **shape)
    rule = AttentionRule("softmax", scale=0.5, window=window)
    want = case.attend(TorchReferenceAttention(), rule)
    assert_close(case.attend(CpuFusedAttention(), rule), want)


def test_lengths_of_many_tiles_of_the_usual_size() -> None:
    case = make_case([Lengths(0, 700, 300), Lengths(513, 20, 5)], heads=4, dqk=32, dv=32)
    rule = AttentionRule("silu", scale=0.2, normaliser=700)
    want = case.attend(TorchReferenceAttention(), rule)
    assert_close(case.attend(CpuFusedAttention(), rule), want)


def test_kernel_for_processors_without_long_vectors() -> None:
    """The same once more, compiled in a process of its own for what every processor has."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    test = f"{__file__}::{test_lengths_of_many_tiles_of_the_usual_size.__name__}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_instance_serves_models_and_steps_of_any_size() -> None:
    backend = CpuFusedAttention()
    rule = AttentionRule("silu", scale=1.0, normaliser=NORMALISER, window=30, group_size=3)
    for seed, (rows, dqk, dv, dtype) in enumerate(
        [
            (40, 8, 8, torch.float32),
            (3, 40, 2, torch.float32),
            (90, 8, 40, torch.bfloat16),
            (40, 8, 8, torch.float32),
        ]
    ):
        case = make_case([Lengths(5, rows, rows)], dqk=dqk, dv=dv, dtype=dtype, seed=seed)
        want = case.widened().attend(TorchReferenceAttention(), rule)
        assert_close(case.attend(backend, rule), want, 1e-5 if dtype == torch.float32 else 2**-8)


def test_one_instance_forgets_what_was_no_number() -> None:
    backend = CpuFusedAttention(SMALL_TILE)
    rule = AttentionRule("silu", scale=1.0, normaliser=NORMALISER)
    case = make_case([Lengths(0, 90, 40)])
    for spoilt in (case.q, case.k, case.v):
        spoilt[:] = math.nan
    assert case.attend(backend, rule).isnan().all()
    case = make_case([Lengths(10, 27, 9)])
    assert_close(case.attend(backend, rule), case.attend(TorchReferenceAttention(), rule))


def test_threads_share_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([Lengths(30, 50, 20), Lengths(0, 3, 0)], heads=4)
    rule = AttentionRule("silu", scale=1.0, normaliser=NORMALISER)
    alone = case.attend(CpuFusedAttention(), rule)
    monkeypatch.setattr(cpu_fused, "_PAIRS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(case.attend(CpuFusedAttention(), rule), alone)


def test_bias_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([Lengths(20, 70, 5), Lengths(0, 50, 0)])
    rule = AttentionRule("silu", scale=1.0, normaliser=NORMALISER, window=33)
    bias = make_bias(case)
    want = case.attend(TorchReferenceAttention(), rule, bias)
    asked: list[int] = []

    def watched(sequence: int, queries: slice, keys: slice) -> Tensor:
        asked.append((queries.stop - queries.start) * (keys.stop - keys.start))
        return bias(sequence, queries, keys)

    monkeypatch.setattr(cpu_fused, "_BIAS_NUMBERS", 2000)
    assert_close(case.attend(CpuFusedAttention(), rule, watched), want)
    assert len(asked) > 2
    assert max(asked) <= 2000


def test_tile_of_broken_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="keys_per_tile: 33"):
        CpuFusedAttention(33)


# ---------------------------------------------------------------- what is read and what is not


def test_queries_that_are_no_number_spoil_their_rows_only() -> None:
    case = make_case([Lengths(6, 40, 20)])
    rule = AttentionRule("silu", scale=1.0)
    case.q[[7, 50]] = math.nan
    spoilt = case.attend(CpuFusedAttention(), rule).isnan().all(dim=2).all(dim=1)
    assert spoilt.nonzero().flatten().tolist() == [7, 50]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 50, 75])
def test_key_that_is_no_number_spoils_all_that_read_it(start: int, dtype: torch.dtype) -> None:
    place = 70
    case = make_case([Lengths(start, 80, 10)], dtype=dtype)
    if place < start:
        block, offset = divmod(place, case.kv.k.shape[2])
        case.kv.k[case.batch.sequences[0].block_table[block], LAYER, offset] = math.nan
    else:
        case.k[place - start] = math.nan
    rule = AttentionRule("silu", scale=1.0)
    spoilt = case.attend(CpuFusedAttention(SMALL_TILE), rule).isnan().all(dim=2).all(dim=1)
    assert spoilt[max(0, place - start) :].all()
    assert not spoilt[: max(0, place - start)].any()


def test_rows_out_of_every_window_are_not_read() -> None:
    window, start = 10, 60
    rule = AttentionRule("silu", scale=1.0, window=window)
    case = make_case([Lengths(start, 5, 4)])
    want = case.attend(TorchReferenceAttention(), rule)
    one = case.batch.sequences[0]
    unread = torch.arange(start - window)
    pages = one.block_table[unread // case.kv.k.shape[2]]
    offsets = unread % case.kv.k.shape[2]
    for held in (case.kv.k, case.kv.v):
        held[pages, LAYER, offsets] = math.nan
    assert_close(case.attend(CpuFusedAttention(SMALL_TILE), rule), want)


@given(
    num_open_rows=st.integers(0, 12),
    window=st.integers(0, 12),
    length=st.integers(1, 30),
    data=st.data(),
)
def test_interval_is_the_mask(
    num_open_rows: int, window: int, length: int, data: st.DataObject
) -> None:
    rule = AttentionRule("silu", 1.0, num_open_rows=num_open_rows, window=window)
    position = data.draw(st.integers(0, length))
    constants = Constants(1, 1, 1, window, num_open_rows, 1, np.float32(1), np.float32(1), COLUMNS)
    first, end = interval_of.py_func(position, length, constants)
    mask = context_mask(rule, torch.tensor([position]), torch.arange(length))[0]
    assert mask.nonzero().flatten().tolist() == list(range(first, end))


# ---------------------------------------------------------------- the SiLU


def silu_in_float64(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        wide = x.astype(np.float64)
        silu: npt.NDArray[np.float64] = wide / (1.0 + np.exp(-wide))
    return silu


# The pass of this processor, and that of those which have no instructions for powers of two.
passes = pytest.mark.parametrize("silu_pass", [silu_pass, plain_silu_pass], ids=["own", "plain"])


@passes
def test_silu_is_right_to_two_in_ten_million(silu_pass: Callable[[Any, int, int], None]) -> None:
    x = np.linspace(-100.0, 100.0, 2_000_001, dtype=np.float32)
    got = x * np.float32(SCORE_FACTOR)
    silu_pass(got, 0, got.size)
    error = np.abs(got.astype(np.float64) * WEIGHT_FACTOR - silu_in_float64(x))
    assert (error <= 2e-7 * np.maximum(1.0, np.abs(x))).all(), error.max()


@passes
@pytest.mark.parametrize("repeats", [1, 20])
def test_silu_of_the_largest_numbers_and_of_none(
    silu_pass: Callable[[Any, int, int], None], repeats: int
) -> None:
    x = np.array([2e38, -2e38, 1e10, -1e10, 0.0, math.nan, math.inf], dtype=np.float32)
    x = np.repeat(x, repeats)
    got = x * np.float32(SCORE_FACTOR)
    silu_pass(got, 0, got.size)
    want = silu_in_float64(x)
    np.testing.assert_allclose(got * np.float32(WEIGHT_FACTOR), want, rtol=1e-6, atol=1e-6)


@passes
def test_silu_of_less_than_all_numbers_is_none(
    silu_pass: Callable[[Any, int, int], None],
) -> None:
    """As z / (1 + 2^z) has it: no weight that looks right is made of a score that overflowed."""
    got = np.full(40, math.inf, dtype=np.float32)
    silu_pass(got, 0, got.size)
    assert np.isnan(got).all()


def test_pass_leaves_other_numbers_alone() -> None:
    scores = np.full(100, 1.5, dtype=np.float32)
    biased_silu_pass(scores, 3, 50, np.zeros(60, dtype=np.float32), 10)
    assert (scores[:3] == 1.5).all()
    assert (scores[3:53] == scores[3]).all()
    assert scores[3] != 1.5
    assert (scores[53:] == 1.5).all()

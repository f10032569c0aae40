"""How near the attention of a CPU comes to the matrix products of the same machine, on one thread.

Useful floating-point operations per second, that is of the query-key pairs that a model reads and
of no others, are held against those of a large matrix product in the same number format. Two
shapes, with 4 heads of 32 numbers: `causal` is a context computed as one chunk; `reuse` is 16 new
rows and 256 candidates over a prefix in pages of 16 tokens in random order.

Both are measured in turn, in time of this thread alone: what other processes do in between is not
counted. A fraction is the median over all repeats, its spread goes from the 10th percentile to the
90th. `torch_reference` has the same figures of the plain backend.

    python benchmarks/roofline.py --json benchmarks/results/roofline.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.report import benchmark_parser, write_result
from model_executor.attention.backend import AttentionBackend
from model_executor.attention.cpu_fused import CpuFusedAttention
from model_executor.attention.rule import AttentionRule
from model_executor.attention.silu_vectors import silu_pass
from model_executor.attention.torch_reference import TorchReferenceAttention
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch, PagedSequence

HEADS, WIDTH = 4, 32
BLOCK_TOKENS = 16
NEW_ROWS, CANDIDATES = 16, 256
LENGTHS = (2048, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GEMM_SIZES = (512, 1024, 2048)
REPEATS, QUICK_REPEATS = 30, 6
REFERENCE_REPEATS = 4
"""The plain backend takes ten times as long."""
SILU_NUMBERS = 1 << 16


@dataclass(frozen=True)
class Shape:
    """One sequence of a step."""

    name: str
    start: int
    num_rows: int
    num_candidates: int

    @property
    def useful_flops(self) -> int:
        """Of all pairs that are read: two products of so many numbers, for each head."""
        rows = self.num_rows * self.start + self.num_rows * (self.num_rows + 1) // 2
        candidates = self.num_candidates * (self.start + self.num_rows + 1)
        return (rows + candidates) * HEADS * 4 * WIDTH


SHAPES = [(length, Shape("causal", 0, length, 0)) for length in LENGTHS] + [
    (length, Shape("reuse", length, NEW_ROWS, CANDIDATES)) for length in LENGTHS
]


def seconds(work: Callable[[], object]) -> float:
    """Time of this thread for a call."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


@dataclass(frozen=True)
class Layer:
    """A layer's attention of random rows."""

    project: Callable[[], object]
    """Makes the step's rows anew, as a layer does just before: they lie in nearer caches then."""
    attend: Callable[[], object]


def make_layer(shape: Shape, dtype: torch.dtype, backend: AttentionBackend, seed: int) -> Layer:
    """One sequence, its prefix in pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    length = shape.start + shape.num_rows
    num_pages = -(-length // BLOCK_TOKENS)
    table = torch.randperm(num_pages, generator=generator)
    kv_shape = (num_pages, 1, BLOCK_TOKENS, HEADS, WIDTH)
    k, v = (torch.randn(kv_shape, generator=generator).to(dtype) for _ in range(2))
    kv = PagedKV(k, v)
    num_rows = shape.num_rows + shape.num_candidates
    width = HEADS * WIDTH
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = torch.randn(width, 4 * width, generator=generator).to(dtype) / width**0.5
    projected = torch.empty(num_rows, 4 * width, dtype=dtype)
    torch.mm(hidden, weight, out=projected)
    _, v, q, k = projected.unflatten(1, (4, HEADS, WIDTH)).unbind(1)
    places = torch.arange(shape.start, length)
    page_ids, page_offsets = table[places // BLOCK_TOKENS], places % BLOCK_TOKENS
    kv.k[page_ids, 0, page_offsets] = k[: shape.num_rows]
    kv.v[page_ids, 0, page_offsets] = v[: shape.num_rows]
    sequence = PagedSequence(
        first_row=0,
        num_rows=shape.num_rows,
        start=shape.start,
        first_candidate=shape.num_rows,
        num_candidates=shape.num_candidates,
        first_query=0,
        num_queries=shape.num_rows,
        first_candidate_query=shape.num_rows,
        block_table=table,
        features=np.zeros((length, 1), dtype=np.int64),
    )
    positions = torch.cat([places, torch.full((shape.num_candidates,), length)])
    features = np.zeros((num_rows, 1), dtype=np.int64)
    batch = PagedBatch(shape.num_rows, positions, features, page_ids, page_offsets, (sequence,))
    rule = AttentionRule("silu", scale=WIDTH**-0.5, normaliser=max(LENGTHS))
    return Layer(
        project=lambda: torch.mm(hidden, weight, out=projected),
        attend=lambda: backend.attend(q, k, v, kv, 0, batch, rule),
    )


def matrix_product(size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call that multiplies two square matrices."""
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def best_gemm_size(dtype: torch.dtype) -> int:
    """The size whose product reaches the highest rate."""

    def rate(size: int) -> float:
        product = matrix_product(size, dtype)
        return size**3 / float(np.median([seconds(product) for _ in range(8)][1:]))

    return max(GEMM_SIZES, key=rate)


def measure(
    length: int, shape: Shape, dtype: str, backend: AttentionBackend, seeds: list[int], repeats: int
) -> dict[str, Any]:
    """A cell: attention and matrix products in turn."""
    size = best_gemm_size(DTYPES[dtype])
    product = matrix_product(size, DTYPES[dtype])
    attention_rates, gemm_rates = [], []
    for seed in seeds:
        layer = make_layer(shape, DTYPES[dtype], backend, seed)
        layer.attend()  # Compiles what there is to compile and sizes the memory.
        for _ in range(repeats):
            gemm_rates.append(2 * size**3 / seconds(product) / 1e9)
            layer.project()
            attention_rates.append(shape.useful_flops / seconds(layer.attend) / 1e9)
    fractions = np.array(attention_rates) / np.array(gemm_rates)
    return {
        "shape": shape.name,
        "tokens": length,
        "dtype": dtype,
        "fraction": float(np.median(fractions)),
        "spread": np.quantile(fractions, [0.1, 0.9]).tolist(),
        "gflops": float(np.median(attention_rates)),
        "gemm_gflops": float(np.median(gemm_rates)),
        "gemm_size": size,
    }


def silu_rate(repeats: int) -> float:
    """Scores per second, in units of 1e9, that the compiled pass turns into weights."""
    source = torch.randn(SILU_NUMBERS)
    scores = source.numpy().copy()
    rates = []
    for _ in range(repeats + 1):
        scores[:] = source.numpy()
        rates.append(SILU_NUMBERS / seconds(lambda: silu_pass(scores, 0, SILU_NUMBERS)) / 1e9)
    return float(np.median(rates[1:]))


def main() -> None:
    """Measures all cells and writes them."""
    arguments = benchmark_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    repeats = QUICK_REPEATS if arguments.quick else REPEATS
    fused, reference = CpuFusedAttention(), TorchReferenceAttention()
    jobs = [(length, shape, dtype) for dtype in DTYPES for length, shape in SHAPES]
    with torch.inference_mode():
        cells, compared = [], []
        for job in track(jobs, description="shapes"):
            cells.append(measure(*job, fused, arguments.seeds, repeats))
            compared.append(measure(*job, reference, arguments.seeds[:1], REFERENCE_REPEATS))
    causal = [cell for cell in cells if (cell["shape"], cell["dtype"]) == ("causal", "float32")]
    figures = {
        "fraction_of_gemm": min(cell["fraction"] for cell in causal),
        "cells": cells,
        "silu_pass_1e9_per_s": silu_rate(repeats),
        "torch_reference": compared,
        "threads": 1,
        "repeats_per_seed": repeats,
    }
    write_result(arguments.json, figures, arguments.seeds)
    for cell in cells:
        low, high = cell["spread"]
        print(
            f"{cell['shape']:6} {cell['tokens']:5} {cell['dtype']:8} {cell['fraction']:.3f} "
            f"({low:.3f} to {high:.3f}) of {cell['gemm_gflops']:.0f} GFLOP/s"
        )


if __name__ == "__main__":
    main()

"""Runs golden cases through the layers, the attention backend and the paged KV that `serve` uses.

No maths of its own: cases with item ids become a model directory and go through scheduler, pool
and model runner (`id_cases.py`); cases of float rows enter after the embedding (`row_cases.py`).
Blocks are small and the token budget is smaller than a history, so that prefill is chunked where
the model allows it and pages are many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.golden.case import CaseError, GoldenCase
from tests.golden.ranking_cases import run_dlrm, run_nvidia_ranking
from tests.golden.retrieval_cases import run_appends, run_encoder
from tests.golden.row_cases import run_cached_rows, run_rows
from tests.golden.weights import fused_layout

Produced = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """How close one output came."""

    name: str
    largest_error: float
    passed: bool
    optional: bool = False
    """It is shown and does not count."""


def run_case(case: GoldenCase, device: str = "cpu") -> list[OutputCheck]:
    """Reproduces every output of a case, in every weight layout that it holds.

    Raises:
        CaseError: the case has inputs or outputs of a kind that is not known.
    """
    try:
        produced: dict[str, list[Tensor]] = {}
        for name, tensor in _produce(case, device):
            produced.setdefault(name, []).append(tensor)
        return [_check(case, name, produced) for name in case.outputs]
    except KeyError as error:
        raise CaseError(f"{case.path}: {error} is missing") from error


def _produce(case: GoldenCase, device: str) -> Produced:
    yield from _produce_one_layout(case, device)
    fused = fused_layout(case.tensors)
    if fused is not None:
        yield from _produce_one_layout(replace(case, tensors=fused), device)


def _produce_one_layout(case: GoldenCase, device: str) -> Produced:
    inputs = case.header["inputs"]
    if "in.x" in inputs:
        return run_rows(case, device)
    if "in.x_history" in inputs:
        return run_cached_rows(case, device)
    if "in.ids" in inputs:
        return run_encoder(case, device)
    if "in.uih_lengths" in inputs:
        return run_dlrm(case, device)
    if "in.ids.item" in inputs:
        return run_nvidia_ranking(case, device)
    if any(name.endswith(".ids") for name in inputs):
        return run_appends(case, device)
    raise CaseError(f"{case.path}: inputs {inputs} are of no known kind")


def _check(case: GoldenCase, name: str, produced: dict[str, list[Tensor]]) -> OutputCheck:
    """The worst of all times an output was produced."""
    if name not in produced:
        raise CaseError(f"{case.path}: output {name!r} is of no known kind")
    checks = [_compare(case, name, got) for got in produced[name]]
    return max(checks, key=lambda check: (not check.passed, check.largest_error))


def _compare(case: GoldenCase, name: str, got: Tensor) -> OutputCheck:
    want = case.tensors[name]
    if got.shape != want.shape:
        raise CaseError(
            f"{case.path}: output {name!r} has shape {list(got.shape)}, not {list(want.shape)}"
        )
    atol, rtol = case.tolerance
    error = (got.double() - want.double()).abs()
    # A NaN fails the comparison, and must not vanish in the largest error either.
    allowed = atol + rtol * want.double().abs()
    passed = (
        bool((error <= allowed).all()) if want.is_floating_point() else bool((error == 0).all())
    )
    largest = float(error.nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0
    return OutputCheck(name, largest, passed, case.is_optional(name))

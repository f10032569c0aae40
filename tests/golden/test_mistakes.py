"""Mistakes that are easily made move golden outputs beyond their tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_executor.layers.hstu_layer import StuHSTULayer
from model_executor.layers.relative_bias import time_buckets
from model_executor.models import research, stu
from model_executor.models.sequence_model import SequenceModel
from tests.golden import weights
from tests.golden.case import GoldenCase, read_case
from tests.golden.runner import run_case

HERE = Path(__file__).resolve().parent
RESEARCH = sorted(HERE.glob("research_*.safetensors"))

Mistake = Callable[[GoldenCase], GoldenCase]


def with_header(case: GoldenCase, **changes: Any) -> GoldenCase:
    return replace(case, header={**case.header, **changes})


def with_tensors(
    case: GoldenCase, name_ends_in: str, change: Callable[[Tensor], Tensor]
) -> GoldenCase:
    changed = {
        name: change(tensor)
        for name, tensor in case.tensors.items()
        if name.endswith(name_ends_in) and not name.startswith(("out.", "mid."))
    }
    assert changed, f"{case.path} has no tensor {name_ends_in}"
    return replace(case, tensors={**case.tensors, **changed})


def longest_length(case: GoldenCase) -> int:
    lengths = case.header["sequence_lengths"]
    return int(max(lengths.values() if isinstance(lengths, dict) else lengths))


def scale_queries(case: GoldenCase) -> GoldenCase:
    """Scores divided by sqrt(dqk), as other dialects do; queries are columns of the projection."""
    heads, dqk, dv = (case.header[name] for name in ("num_heads", "dqk", "dv"))
    first = 2 * heads * dv

    def change(weight: Tensor) -> Tensor:
        scaled = weight.clone()
        scaled[:, first : first + heads * dqk] /= dqk**0.5
        return scaled

    return with_tensors(case, "_uvqk", change)


RESEARCH_MISTAKES: dict[str, Mistake] = {
    "layer norm eps of 1e-5": lambda case: with_header(case, layer_norm_eps=1e-5),
    "n is the longest length": lambda case: with_header(case, normaliser_n=longest_length(case)),
    "n is one too large": lambda case: with_header(
        case, normaliser_n=case.header["normaliser_n"] + 1
    ),
    "position bias off by one": lambda case: with_tensors(case, "_pos_w", lambda w: w.roll(1)),
    "time bias off by one": lambda case: with_tensors(case, "_ts_w", lambda w: w.roll(1)),
    "queries scaled": scale_queries,
    "output weight scaled": lambda case: with_tensors(case, "_o.weight", lambda w: w * 1.001),
    "output bias left out": lambda case: with_tensors(case, "_o.bias", torch.zeros_like),
    "output weight transposed": lambda case: with_tensors(
        case, "_o.weight", lambda w: w.T.contiguous()
    ),
    "times late by one event": lambda case: with_tensors(
        case, "timestamps", lambda t: torch.cat([t[..., :1], t[..., :-1]], dim=-1)
    ),
}


every_research_case = pytest.mark.parametrize("path", RESEARCH, ids=lambda path: path.stem)


@every_research_case
@pytest.mark.parametrize("mistake", RESEARCH_MISTAKES)
def test_research_mistake_fails_the_tolerance(path: Path, mistake: str) -> None:
    assert_fails_the_tolerance(RESEARCH_MISTAKES[mistake](read_case(path)))


@every_research_case
def test_row_that_uses_its_own_time_fails_the_tolerance(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_time(query_times: Tensor, key_times: Tensor, edges: Tensor) -> Tensor:
        return time_buckets(key_times[-len(query_times) :], key_times, edges)

    monkeypatch.setattr(research, "time_buckets", own_time)
    assert_fails_the_tolerance(read_case(path))


def assert_fails_the_tolerance(case: GoldenCase) -> None:
    for check in run_case(case):
        # Ids of the best items may survive a mistake; numbers must not.
        if case.tensors[check.name].is_floating_point():
            assert not check.passed, check
            assert math.isfinite(check.largest_error), check


def zeros(ending: str) -> Mistake:
    return lambda case: with_tensors(case, ending, torch.zeros_like)


def ones(ending: str) -> Mistake:
    return lambda case: with_tensors(case, ending, torch.ones_like)


def rolled(ending: str) -> Mistake:
    return lambda case: with_tensors(case, ending, lambda w: w.roll(1, dims=0))


RANKING_MISTAKES: list[tuple[str, str, Mistake]] = [
    ("stu_layer", "projection bias left out", zeros("_uvqk_beta")),
    ("stu_layer", "input norm bias left out", zeros("_input_norm_bias")),
    ("stu_layer", "output norm weight left out", ones("_output_norm_weight")),
    ("stu_layer", "n one too large", RESEARCH_MISTAKES["n is one too large"]),
    ("stu_layer_variants", "scale of q.k", lambda case: with_header(case, alpha=0.36)),
    ("stu_layer_variants", "window one wider", lambda case: with_header(case, max_attn_len=5)),
    ("stu_layer_variants", "no open rows", lambda case: with_header(case, contextual_seq_len=0)),
    ("stu_stack", "n one too large", RESEARCH_MISTAKES["n is one too large"]),
    (
        "dlrm_streaming_rows",
        "vectors never void",
        lambda case: with_header(case, contextual_min_uih_length={}),
    ),
    ("dlrm_streaming_rows", "positions off by one", rolled("_position_embeddings_weight")),
    ("dlrm_streaming_rows", "target action left out", zeros("_target_action_embedding_table")),
    ("dlrm_streaming_rows", "action bits off by one", rolled("_action_embedding_table")),
    ("dlrm_times_multitask", "time buckets off by one", rolled("_timestamp_embeddings_weight")),
    ("dlrm_times_multitask", "contextual bias left out", zeros("_contextual_linear_bias")),
    (
        "dlrm_times_multitask",
        "query time an hour late",
        lambda case: with_tensors(case, "in.item_query_time", lambda t: t + 3600),
    ),
    ("nvidia_layer", "projection bias left out", zeros("_linear_uvqk.bias")),
    ("nvidia_layer_groups", "groups of three", lambda case: with_header(case, target_group_size=3)),
    ("nvidia_layer_groups", "n one too large", RESEARCH_MISTAKES["n is one too large"]),
    ("nvidia_ranking", "positions off by one", rolled("_position_embeddings_weight")),
    ("nvidia_ranking", "actions off by one", rolled("in.table.action")),
    ("nvidia_ranking", "layer norm eps", lambda case: with_header(case, layer_norm_eps=1e-6)),
    ("nvidia_ranking", "head bias left out", zeros("_mlp._mlp.0.bias")),
]


@pytest.mark.parametrize(
    ("name", "mistake"),
    [pytest.param(name, change, id=f"{name}-{what}") for name, what, change in RANKING_MISTAKES],
)
def test_ranking_mistake_fails_the_tolerance(name: str, mistake: Mistake) -> None:
    assert_something_fails(mistake(read_case(HERE / f"{name}.safetensors")))


def assert_something_fails(case: GoldenCase) -> None:
    checks = [check for check in run_case(case) if not check.optional]
    assert not all(check.passed for check in checks), checks
    assert all(math.isfinite(check.largest_error) for check in checks)


def test_silu_on_all_parts_of_stu_fails_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StuHSTULayer, "activated", "uvqk")
    for name in ("stu_layer", "dlrm_streaming_rows"):
        assert_something_fails(read_case(HERE / f"{name}.safetensors"))


def test_candidates_that_read_one_another_fail_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = SequenceModel.encode

    def in_one_group(model: SequenceModel, *args: Any, **kwargs: Any) -> Tensor:
        model.rule = replace(model.rule, group_size=1000)
        return encode(model, *args, **kwargs)

    monkeypatch.setattr(SequenceModel, "encode", in_one_group)
    for name in ("stu_layer", "stu_cached", "nvidia_layer"):
        assert_something_fails(read_case(HERE / f"{name}.safetensors"))


def test_true_pi_fails_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stu, "_PI", math.pi)
    assert_something_fails(read_case(HERE / "dlrm_times_multitask.safetensors"))


def test_native_weights_read_as_blocks_fail_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        weights, "_from_native", lambda ours, tensor, _: tensor.T if tensor.dim() > 1 else tensor
    )
    for name in ("nvidia_layer", "nvidia_layer_groups", "nvidia_ranking"):
        assert_something_fails(read_case(HERE / f"{name}.safetensors"))

"""Layers of the slow references reproduce those of the original code, with all their options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from model_executor.model_config import NvidiaConfig, StuConfig
from tests.model_executor.golden_checkpoints import golden
from tests.reference.formulas import Array, Weights
from tests.reference.nvidia import ReferenceNvidia
from tests.reference.stu import ReferenceStu
from tests.toy_models import toy_config

STU_NAMES = {
    "_uvqk_weight": "uvqk",
    "_uvqk_beta": "uvqk_bias",
    "_input_norm_weight": "input_norm.weight",
    "_input_norm_bias": "input_norm.bias",
    "_output_weight": "output_weight",
    "_output_norm_weight": "output_norm_weight",
    "_output_norm_bias": "output_norm_bias",
}
NVIDIA_NAMES = {
    "alt.fused._linear_uvqk_weight": "uvqk",
    "alt.fused._linear_uvqk_bias": "uvqk_bias",
    "alt.fused._input_layernorm_weight": "input_norm.weight",
    "alt.fused._input_layernorm_bias": "input_norm.bias",
    "alt.fused._linear_proj_weight": "output_weight",
    "alt.fused._output_layernorm_weight": "output_norm.weight",
    "alt.fused._output_layernorm_bias": "output_norm.bias",
}

# n is the sum of the longest history, the most candidates and the contextual rows.
STU_CASES: dict[str, dict[str, Any]] = {
    "stu_layer": {
        "embedding_dim": 20, "num_heads": 2, "dqk": 6, "dv": 10,
        "contextual": [], "max_sequence_len": 7, "max_candidates": 4,
    },
    "stu_layer_variants": {
        "embedding_dim": 16, "num_heads": 4, "dqk": 4, "dv": 6,
        "contextual": [{"name": "one", "num_rows": 1}, {"name": "two", "num_rows": 1}],
        "max_sequence_len": 7, "max_candidates": 5,
        "contextual_rows_see_history": True, "max_attention_window": 4,
        "group_norm": True, "attention_scale": 0.37,
    },
}  # fmt: skip
NVIDIA_CASES: dict[str, dict[str, Any]] = {
    "nvidia_layer": {
        "embedding_dim": 16, "num_heads": 2, "dqk": 8, "dv": 8, "scaling_seqlen": 13,
    },
    "nvidia_layer_groups": {
        "embedding_dim": 20, "num_heads": 2, "dqk": 6, "dv": 6, "scaling_seqlen": 40,
        "target_group_size": 2,
    },
}  # fmt: skip


def layer_of(case: str, names: dict[str, str]) -> Weights:
    """The case's weights as those of a first layer."""
    return Weights(
        {f"layers.0.{ours}": golden(case)[name].double().numpy() for name, ours in names.items()}
    )


def rows_of_users(case: str) -> list[Array]:
    """Input rows, user by user."""
    tensors = golden(case)
    return [part.double().numpy() for part in tensors["in.x"].split(tensors["in.lengths"].tolist())]


def check(case: str, users: list[Array]) -> None:
    """Holds all rows against the original's."""
    want = golden(case)["out.y"].double().numpy()
    np.testing.assert_allclose(np.concatenate(users), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", STU_CASES)
def test_stu_layer_is_that_of_the_original(case: str) -> None:
    config = toy_config("stu", **STU_CASES[case])
    assert isinstance(config, StuConfig)
    reference = ReferenceStu(config, layer_of(case, STU_NAMES), {})
    targets = golden(case)["in.num_targets"].tolist()
    users = zip(rows_of_users(case), targets, strict=True)
    check(case, [reference.layer(0, x, len(x) - number) for x, number in users])


@pytest.mark.parametrize("case", NVIDIA_CASES)
def test_nvidia_layer_is_that_of_the_original(case: str) -> None:
    config = toy_config("nvidia", **NVIDIA_CASES[case])
    assert isinstance(config, NvidiaConfig)
    reference = ReferenceNvidia(config, layer_of(case, NVIDIA_NAMES), {})
    targets = golden(case)["in.num_candidates"].tolist()
    contextual = [0] * len(targets)
    if "in.num_contextuals" in golden(case):
        contextual = golden(case)["in.num_contextuals"].tolist()
    users = zip(rows_of_users(case), contextual, targets, strict=True)
    check(case, [reference.layer(0, x, first, len(x) - number) for x, first, number in users])

"""The reference's weight names and layouts, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tests.golden.case import CaseError

ALTERNATIVE = "alt.fused."
"""Weights of this beginning repeat others in a second layout."""

_RESEARCH_LAYER = {
    "_uvqk": "uvqk",
    "_o.weight": "output.weight",
    "_o.bias": "output.bias",
    "_rel_attn_bias._pos_w": "bias.position_weight",
    "_rel_attn_bias._ts_w": "bias.time_weight",
}
_STU_LAYER = {
    "_uvqk_weight": "uvqk",
    "_uvqk_beta": "uvqk_bias",
    "_input_norm_weight": "input_norm.weight",
    "_input_norm_bias": "input_norm.bias",
    "_output_weight": "output_weight",
    "_output_norm_weight": "output_norm_weight",
    "_output_norm_bias": "output_norm_bias",
}
_NVIDIA_NORMS = {
    "_input_layernorm_weight": "input_norm.weight",
    "_input_layernorm_bias": "input_norm.bias",
    "_output_layernorm_weight": "output_norm.weight",
    "_output_layernorm_bias": "output_norm.bias",
}
_NVIDIA_LAYER = {
    **_NVIDIA_NORMS,
    "_linear_uvqk.weight": "uvqk",
    "_linear_uvqk.bias": "uvqk_bias",
    "_linear_proj.weight": "output_weight",
}
_NVIDIA_FUSED_LAYER = {
    **_NVIDIA_NORMS,
    "_linear_uvqk_weight": "uvqk",
    "_linear_uvqk_bias": "uvqk_bias",
    "_linear_proj_weight": "output_weight",
}
_STACKED_LAYER = re.compile(r"(?:.*\.)?(?:_attention_layers|_stu_layers)\.(\d+)\.(.+)")

_STU_MODEL = {
    "_hstu_transducer._input_preprocessor._content_embedding_mlp": "content_mlp",
    "_hstu_transducer._input_preprocessor._action_embedding_mlp": "action_mlp",
    "_hstu_transducer._input_preprocessor._additional_embedding_mlp": "feature_mlp",
    "_hstu_transducer._input_preprocessor._action_encoder._action_embedding_table": "action_table",
    "_hstu_transducer._input_preprocessor._action_encoder._target_action_embedding_table": (
        "target_action"
    ),
    "_hstu_transducer._input_preprocessor._batched_contextual_linear_weights": "contextual_weight",
    "_hstu_transducer._input_preprocessor._batched_contextual_linear_bias": "contextual_bias",
    "_hstu_transducer._positional_encoder._position_embeddings_weight": "position_embedding",
    "_hstu_transducer._positional_encoder._timestamp_embeddings_weight": "time_embedding",
    "_hstu_transducer._output_postprocessor._time_feature_combiner": "time_combiner",
    "_hstu_transducer._output_postprocessor._layer_norm": "user_norm",
    "_item_embedding_mlp": "item_mlp",
    "_multitask_module._prediction_module": "head",
}
_NVIDIA_MODEL = {
    "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight": (
        "position_embedding"
    ),
    "_mlp._mlp": "head",
}


def model_weights(tensors: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Weights outside the layers, under our names."""
    names = {"stu": _STU_MODEL, "nvidia": _NVIDIA_MODEL}[dialect]
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in names.items():
            if name == theirs or name.startswith(f"{theirs}."):
                found[ours + name.removeprefix(theirs)] = tensor
    return found


def layer_weights(
    tensors: Mapping[str, Tensor], dialect: str, num_layers: int, num_heads: int, path: object
) -> dict[str, Tensor]:
    """Weights of all layers under our names.

    Raises:
        CaseError: one is missing.
    """
    names: Mapping[str, str] = {
        "research": _RESEARCH_LAYER,
        "stu": _STU_LAYER,
        "nvidia": _NVIDIA_LAYER,
    }[dialect]
    tensors = {name: one for name, one in tensors.items() if not name.startswith(ALTERNATIVE)}
    native = dialect == "nvidia"
    if native and any(name.endswith("_linear_uvqk_weight") for name in tensors):
        names, native = _NVIDIA_FUSED_LAYER, False
    weights = {}
    for name, tensor in tensors.items():
        stacked = _STACKED_LAYER.fullmatch(name)
        index, part = (stacked[1], stacked[2]) if stacked else ("0", name)
        if part in names:
            ours = names[part]
            weights[f"layers.{index}.{ours}"] = (
                _from_native(ours, tensor, num_heads) if native else tensor
            )
    for layer in range(num_layers):
        for theirs, ours in names.items():
            if f"layers.{layer}.{ours}" not in weights:
                raise CaseError(f"{path}: {theirs!r} of layer {layer} is missing")
    return weights


def _from_native(ours: str, tensor: Tensor, num_heads: int) -> Tensor:
    """(out, in) with [u v q k] head by head, as (in, out) in blocks [U | V | Q | K]."""
    if ours.startswith("uvqk"):
        tensor = tensor.unflatten(0, (num_heads, 4, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.T if ours in ("uvqk", "output_weight") else tensor


def fused_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The same case with its layers in the fused layout, if it has them in both."""
    prefix = "alt.fused."
    fused = {
        name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)
    }
    if not fused:
        return None
    native = re.compile(r"_linear_(uvqk|proj)\.|_layernorm_")
    others = {
        name: one
        for name, one in tensors.items()
        if not name.startswith(ALTERNATIVE) and not native.search(name)
    }
    return others | fused

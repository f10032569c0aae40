"""Checkpoints of the `research` dialect: one file of meta-recsys/generative-recommenders.

Layout: `torch.save` in generative_recommenders/research/trainer/train.py; names: `HSTU` and its
modules in research/modeling/sequential/ (hstu.py, embedding_modules.py,
input_features_preprocessors.py), at commit db1bf8f.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_executor.converters.conversion import Conversion, Theirs, dense_weights, divide
from model_executor.converters.options import Options
from model_executor.converters.state_dict import StateDict, num_layers, state_dict_of
from model_executor.converters.tables import tensor_table
from model_executor.converters.torch_checkpoint import load_torch_file
from model_executor.model_config import ITEM_TABLE, ResearchConfig

_ITEMS = "_embedding_module._item_emb.weight"
_POSITIONS = "_input_features_preproc._pos_emb.weight"
_LAYER = "_hstu._attention_layers.{}"
_LAYER_WEIGHTS = {
    "uvqk": "_uvqk",
    "output.weight": "_o.weight",
    "output.bias": "_o.bias",
    "bias.position_weight": "_rel_attn_bias._pos_w",
    "bias.time_weight": "_rel_attn_bias._ts_w",
}


def read_research(source: Path, options: Options) -> Conversion:
    """Reads a checkpoint file.

    Raises:
        CheckpointError: names what cannot be converted.
        ModelDirectoryError: a given field has a bad value.
    """
    options.require("num_heads", "max_sequence_len", "layer_norm_eps", "l2_norm_eps")
    state = state_dict_of(load_torch_file(source), "model_state_dict", source)
    config = options.config(ResearchConfig, _inferred(state, options))
    names = {"position_embedding": Theirs(_POSITIONS)}
    for layer in range(config.num_layers):
        for ours, theirs in _LAYER_WEIGHTS.items():
            names[f"layers.{layer}.{ours}"] = Theirs(f"{_LAYER.format(layer)}.{theirs}")
    state.drop("_attn_mask", "the causal mask, a constant")
    items = tensor_table(state.take(_ITEMS), state.label(_ITEMS))
    weights = dense_weights(config, state, names, {})
    state.check_all_used()
    return Conversion(config, weights, {ITEM_TABLE: items}, state.dropped)


def _inferred(state: StateDict, options: Options) -> dict[str, Any]:
    first = _LAYER.format(0)
    heads, max_sequence_len = options.integer("num_heads"), options.integer("max_sequence_len")
    num_rows, dim = state.shape(_ITEMS, 2)
    num_positions, _ = state.shape(_POSITIONS, 2)
    if max_sequence_len > num_positions:
        raise options.error(
            f"max_sequence_len: is {max_sequence_len}, the checkpoint has {num_positions} positions"
        )
    _, v_width = state.shape(f"{first}._o.weight", 2)
    _, width = state.shape(f"{first}._uvqk", 2)
    # Columns are u and v, then q and k.
    return {
        "num_items": num_rows - 1,  # Row 0 is padding.
        "embedding_dim": dim,
        "num_layers": num_layers(state, r"_hstu\._attention_layers\.(\d+)\..+"),
        "dv": divide(state, f"{first}._o.weight", v_width, heads, f"{heads} heads"),
        "dqk": divide(
            state,
            f"{first}._uvqk",
            width - 2 * v_width,
            2 * heads,
            f"u and v of {v_width} columns each, and q and k of {heads} heads",
        ),
        "max_output_len": num_positions - max_sequence_len,
        "num_time_buckets": state.shape(f"{first}._rel_attn_bias._ts_w", 1)[0] - 1,
    }

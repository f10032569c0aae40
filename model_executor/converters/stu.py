"""Checkpoints of the `stu` dialect: a directory of DLRMv3.

Layout: `save_dmp_checkpoint` in generative_recommenders/dlrm_v3/checkpoint.py of
meta-recsys/generative-recommenders at commit db1bf8f (the same in recommendation/dlrm_v3 of
mlcommons/inference at b66003e); names: modules/dlrm_hstu.py and the modules that it builds.

non_sparse.ckpt     `torch.save` of `dense_dict` and of what belongs to training
sparse/             a torch distributed checkpoint of the embedding tables
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model_executor.converters.conversion import Conversion, Theirs, dense_weights, divide
from model_executor.converters.distributed_checkpoint import read_tables
from model_executor.converters.errors import CheckpointError
from model_executor.converters.options import Options
from model_executor.converters.state_dict import StateDict, num_layers, state_dict_of
from model_executor.converters.tables import Table, check_width, item_table, tensor_table
from model_executor.converters.torch_checkpoint import load_torch_file
from model_executor.model_config import ITEM_TABLE, SMALL_TABLE_ROWS, StuConfig

DENSE_FILE = "non_sparse.ckpt"
SPARSE_DIRECTORY = "sparse"

_TABLE = r"_embedding_collection\.embeddings\.([^.]+)\.weight"
_TRANSDUCER = "_hstu_transducer."
_PREPROCESSOR = f"{_TRANSDUCER}_input_preprocessor."
_ENCODER = f"{_PREPROCESSOR}_action_encoder."
_POSTPROCESSOR = f"{_TRANSDUCER}_output_postprocessor."
_POSITIONS = f"{_TRANSDUCER}_positional_encoder._position_embeddings_weight"
_TIMES = f"{_TRANSDUCER}_positional_encoder._timestamp_embeddings_weight"
_LAYER = f"{_TRANSDUCER}_stu_module._stu_layers."
_FEATURE_MLP = f"{_PREPROCESSOR}_additional_embedding_mlp"
_ITEM_MLP = "_item_embedding_mlp"
_HEAD = "_multitask_module._prediction_module"

_LAYER_WEIGHTS = {
    "uvqk": "_uvqk_weight",
    "uvqk_bias": "_uvqk_beta",
    "input_norm.weight": "_input_norm_weight",
    "input_norm.bias": "_input_norm_bias",
    "output_norm_weight": "_output_norm_weight",
    "output_norm_bias": "_output_norm_bias",
    "output_weight": "_output_weight",
}
_WEIGHTS = {
    "action_table": f"{_ENCODER}_action_embedding_table",
    "target_action": f"{_ENCODER}_target_action_embedding_table",
    "contextual_weight": f"{_PREPROCESSOR}_batched_contextual_linear_weights",
    "contextual_bias": f"{_PREPROCESSOR}_batched_contextual_linear_bias",
    "position_embedding": _POSITIONS,
    "time_embedding": _TIMES,
}
_MODULES = {
    "content_mlp": (f"{_PREPROCESSOR}_content_embedding_mlp", 4),
    "action_mlp": (f"{_PREPROCESSOR}_action_embedding_mlp", 4),
    "feature_mlp": (_FEATURE_MLP, 4),
    "item_mlp": (_ITEM_MLP, 4),
    "head": (_HEAD, 3),
}
"""Ours to theirs, and of how many modules each consists."""
_CONSTANTS: dict[str, list[list[float]]] = {
    f"{_POSTPROCESSOR}_period_units": [[3600.0, 86_400.0]],
    f"{_POSTPROCESSOR}_units_per_period": [[24.0, 7.0]],
}
"""Hour of the day and day of the week, which our model has built in."""


def read_stu(source: Path, options: Options) -> Conversion:
    """Reads a checkpoint directory.

    Raises:
        CheckpointError: names what cannot be converted.
        ModelDirectoryError: a given field has a bad value.
    """
    options.require("num_heads", "max_sequence_len", "max_candidates", "tasks", "layer_norm_eps")
    path = source / DENSE_FILE
    state = state_dict_of(load_torch_file(path), "dense_dict", path)
    tables = _tables(source, state)
    features = [entry["name"] for entry in options.entries("features")]
    contextual = [entry["name"] for entry in options.entries("contextual")]
    items = item_table(tables, [*features, *contextual], str(source))
    rows = {name: table.shape[0] for name, table in tables.items()}
    inferred = _inferred(state, options)
    check_width(tables, inferred["table_dim"])
    completed = {name: options.with_rows(name, rows) for name in ("features", "contextual")}
    config = options.config(StuConfig, {"num_items": rows[items], **inferred}, completed)
    _check_tasks(state, options)
    _drop_constants(state, inferred["num_action_bits"], bool(features))
    pooled = {ITEM_TABLE: tables[items]}
    small = {f"feature_tables.table_{name}": tables[name] for name in features}
    for name in contextual:
        if rows[name] > SMALL_TABLE_ROWS:
            pooled[f"contextual.{name}"] = tables[name]
        else:
            small[f"contextual_tables.table_{name}"] = tables[name]
    weights = dense_weights(config, state, _names(config), small)
    state.check_all_used()
    return Conversion(config, weights, pooled, state.dropped)


def _tables(source: Path, state: StateDict) -> dict[str, Table]:
    """All embedding tables by name, from `sparse/` and from the dense part."""
    tables: dict[str, Table] = {}
    directory = source / SPARSE_DIRECTORY
    for name, table in read_tables(directory).items():
        # The state dict is saved as an item of a larger one.
        match = re.fullmatch(rf"(?:sparse_dict\.)?{_TABLE}", name)
        if match is None or match[1] in tables:
            problem = "is no embedding table" if match is None else "is there twice"
            raise CheckpointError(f"{directory}: tensor {name!r}: {problem}")
        tables[match[1]] = table
    # Tables that training did not shard stay with the dense weights.
    for match in state.names(_TABLE):
        if match[1] in tables:
            raise state.error(match[0], f"is in {directory} as well")
        tables[match[1]] = tensor_table(state.take(match[0]), state.label(match[0]))
    return tables


def _inferred(state: StateDict, options: Options) -> dict[str, Any]:
    heads = options.integer("num_heads")
    first = f"{_LAYER}0."
    positions, dim = state.shape(_POSITIONS, 2)
    hidden, table_dim = state.shape(f"{_PREPROCESSOR}_content_embedding_mlp.0.weight", 2)
    action_bits, action_dim = state.shape(f"{_ENCODER}_action_embedding_table", 2)
    output_rows, _ = state.shape(f"{first}_output_weight", 2)
    _, width = state.shape(f"{first}_uvqk_weight", 2)
    # The output reads u, what attention gave and the gate of both.
    dv = divide(state, f"{first}_output_weight", output_rows, 3 * heads, f"3 x {heads} heads")
    found: dict[str, Any] = {
        "embedding_dim": dim,
        "table_dim": table_dim,
        "num_layers": num_layers(state, rf"{re.escape(_LAYER)}(\d+)\..+"),
        "dv": dv,
        "dqk": divide(
            state,
            f"{first}_uvqk_weight",
            width - 2 * heads * dv,
            2 * heads,
            f"u and v of {heads * dv} columns each, and q and k of {heads} heads",
        ),
        "num_action_bits": action_bits,
        "action_dim": action_dim,
        "num_positions": positions,
        "num_time_buckets": state.shape(_TIMES, 2)[0] - 1,
        "preprocessor_hidden_dim": hidden,
        "item_hidden_dim": state.shape(f"{_ITEM_MLP}.0.weight", 2)[0],
        "head_hidden_dim": state.shape(f"{_HEAD}.0.weight", 2)[0],
    }
    if dv > 1:  # With one value per head, both norms have as many weights.
        norm_width = state.shape(f"{first}_output_norm_weight", 1)[0]
        found["group_norm"] = norm_width != heads * dv
    return found


def _check_tasks(state: StateDict, options: Options) -> None:
    tasks = options.entries("tasks")
    outputs, _ = state.shape(f"{_HEAD}.2.weight", 2)
    if outputs != len(tasks):
        raise options.error(f"tasks: names {len(tasks)}, the checkpoint's head has {outputs}")
    kinds = [task.get("kind", "binary") for task in tasks]
    if kinds != sorted(kinds):
        raise options.error("tasks: binary ones come first, as in the checkpoint's head")


def _drop_constants(state: StateDict, action_bits: int, reads_features: bool) -> None:
    """Checks that the constants are those that our model has built in."""
    weights = f"{_ENCODER}_combined_action_weights"
    expected: dict[str, list[Any]] = {weights: [1 << bit for bit in range(action_bits)]}
    for name, values in {**expected, **_CONSTANTS}.items():
        found = state.take(name).tolist()
        if found != values:
            raise state.error(name, f"is {found}, only {values} is supported")
        state.dropped[name] = "a constant of our model"
    if not reads_features and f"{_FEATURE_MLP}.0.weight" in state:
        # The reference always builds it; without features it reads nothing.
        if state.shape(f"{_FEATURE_MLP}.0.weight", 2)[1]:
            raise state.error(f"{_FEATURE_MLP}.0.weight", "reads features, the config names none")
        for match in state.names(rf"{re.escape(_FEATURE_MLP)}\..+"):
            state.drop(match[0], "not used without item features")


def _names(config: StuConfig) -> dict[str, Theirs]:
    names = dict(_WEIGHTS)
    for layer in range(config.num_layers):
        for ours, theirs in _LAYER_WEIGHTS.items():
            names[f"layers.{layer}.{ours}"] = f"{_LAYER}{layer}.{theirs}"
    for module, (their_module, number) in _MODULES.items():
        for place in range(number):
            for part in ("weight", "bias"):
                names[f"{module}.{place}.{part}"] = f"{their_module}.{place}.{part}"
    for part in ("weight", "bias"):
        names[f"time_combiner.{part}"] = f"{_POSTPROCESSOR}_time_feature_combiner.{part}"
        names[f"user_norm.{part}"] = f"{_POSTPROCESSOR}_layer_norm.{part}"
    return {ours: Theirs(theirs) for ours, theirs in names.items()}

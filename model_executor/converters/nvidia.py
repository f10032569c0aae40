"""Checkpoints of the `nvidia` dialect: a directory of NVIDIA/recsys-examples.

Layout: `save` in examples/commons/checkpoint/checkpoint.py; names: `RankingGR`
(examples/hstu/model/ranking_gr.py) and examples/hstu/modules/, at commit 43465ae.

torch_module/model.0.pth    `torch.save` of `model_state_dict`; one such file per rank
dynamicemb_module/          tables that dynamicemb dumped, see dynamicemb.py
tables.safetensors          not theirs: where further tables are put, one tensor per table name

The layers come in two layouts: fused ones (fused_hstu_layer.py) keep their matrices (in, out) with
the columns [u | v | q | k]; native and debug ones (native_hstu_layer.py, debug_hstu_layer.py) keep
them (out, in) with the rows grouped by head.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model_executor.converters.conversion import Conversion, Theirs, dense_weights, divide
from model_executor.converters.errors import CheckpointError
from model_executor.converters.nvidia_tables import TableFiles, read_table_files
from model_executor.converters.options import Options
from model_executor.converters.state_dict import StateDict, num_layers, state_dict_of
from model_executor.converters.tables import Table, item_table
from model_executor.converters.torch_checkpoint import load_torch_file
from model_executor.model_config import ITEM_TABLE, SMALL_TABLE_ROWS, NvidiaConfig

_LAYER = "_hstu_block._attention_layers."
_POSITIONS = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"
_TIMES = "_hstu_block._preprocessor._positional_encoder._timestamp_embeddings_weight"
_HEAD = "_mlp._mlp."
_FUSED, _BY_HEAD = "_linear_uvqk_weight", "_linear_uvqk.weight"


def read_nvidia(source: Path, options: Options) -> Conversion:
    """Reads a checkpoint directory.

    Raises:
        CheckpointError: names what cannot be converted.
        ModelDirectoryError: a given field has a bad value.
    """
    options.require("num_heads", "max_sequence_len", "scaling_seqlen", "tasks", "layer_norm_eps")
    if options.given("scaling_seqlen") == -1:
        raise options.error(
            "scaling_seqlen: is -1, the longest sequence of each batch; scores would follow the "
            "batch, so it must be a constant"
        )
    path = _one_file(source / "torch_module")
    state = state_dict_of(load_torch_file(path), "model_state_dict", path)
    inferred = _inferred(state, options)
    files = read_table_files(source, state, inferred["embedding_dim"])
    tables, items = _tables(files, options, source)
    rows = {name: table.shape[0] for name, table in tables.items()}
    completed: dict[str, Any] = {"contextual": options.with_rows("contextual", rows)}
    pooled, small = {ITEM_TABLE: tables[items]}, {}
    for entry in options.with_rows("action", rows, single=True):
        completed["action"] = entry
        small["small_tables.table_action"] = tables[entry["name"]]
    config = options.config(NvidiaConfig, {"num_items": rows[items], **inferred}, completed)
    for feature in config.contextual_features:
        table = tables[feature.name]
        if feature.num_rows > SMALL_TABLE_ROWS:
            pooled[f"contextual.{feature.name}"] = table
        else:
            small[f"small_tables.table_contextual_{feature.name}"] = table
    _drop_unused(state)
    weights = dense_weights(config, state, _names(config, state), small)
    state.check_all_used()
    return Conversion(config, weights, pooled, state.dropped, files.notes(rows))


def _drop_unused(state: StateDict) -> None:
    for match in state.names(r".+\._extra_state"):
        state.drop(match[0], "scaling factors of low-precision training")
    if _TIMES in state:
        raise state.error(_TIMES, "time encoding is not supported")


def _one_file(directory: Path) -> Path:
    found = sorted(directory.glob("model.*.pth"))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(found)} files of ranks; with tensor parallelism each has a "
            "part of every layer. If the ranks differed in data alone, keep model.0.pth only"
        )
    return directory / "model.0.pth"


def _tables(files: TableFiles, options: Options, source: Path) -> tuple[dict[str, Table], str]:
    """All tables by name, and the name of the items' one."""
    features = [*options.entries("action", single=True), *options.entries("contextual")]
    given = {entry["name"]: entry.get("num_rows") for entry in features}
    items = item_table(files.names, list(given), str(source))
    given[items] = options.given("num_items")
    for name, number in given.items():
        if number is not None and (type(number) is not int or number < 1):
            raise options.error(f"rows of {name}: are {number!r}, must be a whole number from 1 on")
        if number is None and name in files.unsized:
            field = "num_items" if name == items else f"num_rows of {name}"
            raise options.error(f"missing: {field} (the checkpoint does not say)")
    return files.open(given), items


def _inferred(state: StateDict, options: Options) -> dict[str, Any]:
    heads = options.integer("num_heads")
    num_positions, dim = state.shape(_POSITIONS, 2)
    fused = _is_fused(state)
    uvqk = f"{_LAYER}0.{_FUSED if fused else _BY_HEAD}"
    width = state.shape(uvqk, 2)[1 if fused else 0]
    per_head = divide(state, uvqk, width, 4 * heads, f"u, v, q and k of {heads} heads")
    places = sorted(int(match[1]) for match in state.names(rf"{re.escape(_HEAD)}(\d+)\.weight"))
    return {
        "embedding_dim": dim,
        "num_layers": num_layers(state, rf"{re.escape(_LAYER)}(\d+)\..+"),
        "dqk": per_head,
        "dv": per_head,
        "num_position_buckets": num_positions,
        "prediction_head": [state.shape(f"{_HEAD}{place}.weight", 2)[0] for place in places],
    }


def _is_fused(state: StateDict) -> bool:
    """Which of the two layouts the layers have.

    Raises:
        CheckpointError: they have both; names a tensor of each.
    """
    layers = re.escape(_LAYER)
    fused = state.names(rf"{layers}\d+\._linear_(uvqk|proj)_(weight|bias)")
    by_head = state.names(rf"{layers}\d+\._linear_(uvqk|proj)\.(weight|bias)")
    if fused and by_head:
        raise state.error(
            fused[0][0], f"is of fused layers, {by_head[0][0]!r} of native ones; which is meant?"
        )
    return bool(fused)


def _names(config: NvidiaConfig, state: StateDict) -> dict[str, Theirs]:
    names = {"position_embedding": Theirs(_POSITIONS)}
    for place in range(len(config.prediction_head)):
        for part in ("weight", "bias"):
            # Linear layers with an activation between them, there as here.
            names[f"head.{2 * place}.{part}"] = Theirs(f"{_HEAD}{2 * place}.{part}")
    fused = _is_fused(state)
    for layer in range(config.num_layers):
        theirs, ours = f"{_LAYER}{layer}", f"layers.{layer}"
        if fused:
            names[f"{ours}.uvqk"] = Theirs(f"{theirs}._linear_uvqk_weight")
            names[f"{ours}.uvqk_bias"] = Theirs(f"{theirs}._linear_uvqk_bias")
            names[f"{ours}.output_weight"] = Theirs(f"{theirs}._linear_proj_weight")
        else:
            heads = config.num_heads
            names[f"{ours}.uvqk"] = Theirs(f"{theirs}._linear_uvqk.weight", True, heads)
            names[f"{ours}.uvqk_bias"] = Theirs(f"{theirs}._linear_uvqk.bias", False, heads)
            names[f"{ours}.output_weight"] = Theirs(f"{theirs}._linear_proj.weight", True)
        # Native layers keep the weights of the output norm in a module of its own.
        native = f"{theirs}._output_ln_dropout_mul.weight" in state
        output_norm = "_output_ln_dropout_mul." if native else "_output_layernorm_"
        for part in ("weight", "bias"):
            names[f"{ours}.input_norm.{part}"] = Theirs(f"{theirs}._input_layernorm_{part}")
            names[f"{ours}.output_norm.{part}"] = Theirs(f"{theirs}.{output_norm}{part}")
    return names

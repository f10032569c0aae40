"""Golden cases written as the checkpoints that their reference code would have saved."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

GOLDEN = Path(__file__).parent.parent / "golden"

STU_TABLE = "_embedding_collection.embeddings.{}.weight"
FEATURE_MLP = "_hstu_transducer._input_preprocessor._additional_embedding_mlp"
COLLECTION = "_embedding_collection._{}_parallel_embedding_collection.embeddings.{}"
DUMP = "dynamicemb_module/model._embedding_collection._model_parallel_embedding_collection"

CONFIGS: dict[str, dict[str, Any]] = {
    "research_encoder": {
        "num_heads": 2,
        "max_sequence_len": 40,
        "layer_norm_eps": 1e-6,
        "l2_norm_eps": 1e-6,
    },
    "dlrm_streaming_rows": {
        "num_heads": 2,
        "max_sequence_len": 44,
        "max_candidates": 6,
        "layer_norm_eps": 1e-6,
        "truncation": "oldest",
        "features": [{"name": "item_category_id"}],
        "contextual": [{"name": "user_id", "min_sequence_len": 20}],
        "tasks": [{"name": "rating"}],
    },
    "dlrm_times_multitask": {
        "num_heads": 2,
        "max_sequence_len": 26,
        "max_candidates": 5,
        "layer_norm_eps": 1e-6,
        "contextual": [
            {"name": "user_id", "min_sequence_len": 15},
            {"name": "user_active_degree"},
            {"name": "follow_user_num_range"},
            {"name": "fans_user_num_range"},
            {"name": "friend_user_num_range"},
            {"name": "register_days_range", "min_sequence_len": 30},
        ],
        "tasks": [
            {"name": name}
            for name in (
                "is_click",
                "is_like",
                "is_follow",
                "is_comment",
                "is_forward",
                "is_hate",
                "long_view",
                "is_profile_enter",
            )
        ],
    },
    "nvidia_ranking": {
        "num_heads": 2,
        "max_sequence_len": 14,
        "scaling_seqlen": 96,
        "layer_norm_eps": 1e-5,
        "num_items": 70,
        "action": {"name": "action", "num_rows": 9},
        "contextual": [{"name": "user0", "num_rows": 11}, {"name": "user1", "num_rows": 11}],
        "tasks": [{"name": f"task{number}"} for number in range(8)],
    },
}
"""What the checkpoints do not say."""


@functools.cache
def golden(case: str) -> dict[str, Tensor]:
    """All tensors of a case."""
    with safe_open(GOLDEN / f"{case}.safetensors", framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_config(directory: Path, case: str, **changes: Any) -> Path:
    """The `--config` file of a case; None takes a field out."""
    fields = {**CONFIGS[case], **changes}
    path = directory / "config-fields.json"
    path.write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None})
    )
    return path


def weights(case: str, prefix: str = "_") -> dict[str, Tensor]:
    """Tensors under the reference's names."""
    return {name: tensor for name, tensor in golden(case).items() if name.startswith(prefix)}


def research_state(prefix: str = "") -> dict[str, Any]:
    """The state dict of the research case."""
    state = {**weights("research_encoder"), "_attn_mask": torch.ones(51, 51).triu(1).bool()}
    return {prefix + name: tensor for name, tensor in state.items()}


def write_research(directory: Path, state: Mapping[str, Any] | None = None) -> Path:
    """A file of research/trainer/train.py."""
    path = directory / "ml-1m_ep100"
    torch.save(
        {
            "epoch": 100,
            "model_state_dict": research_state("module.") if state is None else state,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        },
        path,
    )
    return path


def stu_parts(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Dense tensors, and tables by their short names."""
    dense: dict[str, Any] = weights(case)
    head, tail = STU_TABLE.split("{}")
    tables = {
        name.removeprefix(head).removesuffix(tail): dense.pop(name)
        for name in list(dense)
        if name.startswith(head)
    }
    return dense, tables


def write_stu(directory: Path, dense: Mapping[str, Any], tables: Mapping[str, Tensor]) -> Path:
    """A directory of `save_dmp_checkpoint`."""
    source = directory / "89"
    (source / "sparse").mkdir(parents=True)
    names = [STU_TABLE.format(name) for name in tables]
    torch.save(
        {
            "dense_dict": dense,
            "optimizer_dict": {"state": {}, "param_groups": []},
            "class_metrics": {"train": [], "eval": []},
            "reg_metrics": {"train": [], "eval": []},
            "global_step": {"train": 7, "eval": 0},
            "sparse_tensor_keys": set(names),
        },
        source / "non_sparse.ckpt",
    )
    save_distributed(source / "sparse", dict(zip(names, tables.values(), strict=True)))
    return source


def save_distributed(directory: Path, tables: Mapping[str, Tensor]) -> None:
    """A torch distributed checkpoint, written by one process without a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That there is no process group.
        save({"sparse_dict": dict(tables)}, checkpoint_id=directory, no_dist=True)


def write_nvidia(
    directory: Path, state: Mapping[str, Any], tables: Mapping[str, Tensor] | None = None
) -> Path:
    """A directory of examples/commons/checkpoint, with tables in `tables.safetensors`."""
    source = directory / "iter100"
    (source / "torch_module").mkdir(parents=True)
    (source / "dynamicemb_module").mkdir()
    torch.save(
        {"model_state_dict": state, "optimizer_state_dict": None},
        source / "torch_module" / "model.0.pth",
    )
    if tables:
        save_file(dict(tables), source / "tables.safetensors")
    return source


def nvidia_tables() -> dict[str, Tensor]:
    """Tables of the nvidia case by name."""
    found = weights("nvidia_ranking", "in.table.")
    return {name.removeprefix("in.table."): table for name, table in found.items()}


def fused_state() -> dict[str, Any]:
    """The state dict of the nvidia case with fused layers."""
    state: dict[str, Any] = {
        name: tensor
        for name, tensor in weights("nvidia_ranking").items()
        if "_attention_layers" not in name
    }
    fused = weights("nvidia_ranking", "alt.fused.")
    return {**state, **{name.removeprefix("alt.fused."): one for name, one in fused.items()}}


def dump_table(source: Path, name: str, ids: list[int], rows: Tensor, ranks: int = 2) -> None:
    """Writes a table as dynamicemb does, each id on rank id modulo ranks."""
    directory = source / DUMP
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}_opt_args.json").write_text("{}")
    keys = np.array(ids, dtype=np.int64)
    for rank in range(ranks):
        end = f"rank_{rank}.world_size_{ranks}"
        mine = keys[keys % ranks == rank]
        mine.tofile(directory / f"{name}_emb_keys.{end}")
        rows[torch.from_numpy(mine)].numpy().tofile(directory / f"{name}_emb_values.{end}")
        np.zeros(len(mine), dtype=np.int64).tofile(directory / f"{name}_emb_scores.{end}")

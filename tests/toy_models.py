"""Small models with seeded random weights, in which no term is so small that it could hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from block_manager.pool_layout import PoolConfig
from helm_engine.config import EngineConfig, SchedulerConfig
from model_executor.checkpoint import load_config, save_model
from model_executor.model_config import ITEM_TABLE, ModelConfig, parse_model_config
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel
from tests.reference import ReferenceHSTU, load_reference

TOY_CONFIG: dict[str, Any] = {
    "model_type": "hstu",
    "dialect": "research",
    "dtype": "float32",
    "num_items": 60,
    "embedding_dim": 12,
    "num_layers": 3,
    "num_heads": 2,
    "dqk": 4,
    "dv": 6,
    "max_sequence_len": 24,
    "max_output_len": 3,
    "num_time_buckets": 64,
    "layer_norm_eps": 1e-6,
    "l2_norm_eps": 1e-6,
}

_SIZES = {name: TOY_CONFIG[name] for name in list(TOY_CONFIG)[2:10]}

TOY_CONFIGS: dict[str, dict[str, Any]] = {
    "research": TOY_CONFIG,
    "stu": {
        **_SIZES,
        "model_type": "hstu",
        "dialect": "stu",
        "layer_norm_eps": 1e-6,
        "table_dim": 10,
        "features": [{"name": "category", "num_rows": 7}],
        "contextual": [
            {"name": "user_id", "num_rows": 5000, "min_sequence_len": 70},
            {"name": "device", "num_rows": 4},
        ],
        "tasks": [{"name": "click"}, {"name": "dwell", "kind": "regression"}],
        "num_action_bits": 5,
        "action_dim": 3,
        "max_candidates": 60,
        "num_positions": 64,
        "num_time_buckets": 40,
        "preprocessor_hidden_dim": 14,
        "item_hidden_dim": 18,
        "head_hidden_dim": 16,
    },
    "nvidia": {
        **_SIZES,
        "model_type": "hstu",
        "dialect": "nvidia",
        "layer_norm_eps": 1e-5,
        "dqk": 5,
        "dv": 5,
        "tasks": [{"name": "click"}, {"name": "like"}],
        "rank_by": "like",
        "num_position_buckets": 40,
        "scaling_seqlen": 30,
        "action": {"name": "action", "num_rows": 9},
        "prediction_head": [11, 2],
    },
    "sasrec": {
        **_SIZES,
        "model_type": "sasrec",
        "dialect": "sasrec",
        "layer_norm_eps": 1e-6,
        "ffn_dim": 16,
    },
}
"""One toy model for each dialect; all terms of each dialect are there."""


def toy_config(dialect: str = "research", **changes: Any) -> ModelConfig:
    """The toy configuration of a dialect, with changes."""
    return parse_model_config({**TOY_CONFIGS[dialect], **changes}, "toy")


def randomise(model: SequenceModel, seed: int = 0) -> None:
    """Sets every weight so that no norm, bias or table is one that could be dropped unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "bias" in name or "norm" in name else 1.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 1 and name.endswith("weight") and "bias" not in name:
                parameter.add_(1.0)  # A norm's.


def random_tables(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pooled tables of a model; a padding row is zeros."""
    generator = torch.Generator().manual_seed(seed + 1)
    tables = {
        table.name: 0.3 * torch.randn(table.num_rows, config.row_dim, generator=generator)
        for table in config.row_tables
    }
    tables[ITEM_TABLE][: config.first_item_id] = 0.0
    return tables


def write_toy_model(directory: Path, config: ModelConfig, seed: int = 0) -> Path:
    """Writes a model directory with random weights."""
    model = build_model(config)
    randomise(model, seed)
    save_model(directory, model, random_tables(config, seed))
    return directory


def read_reference(directory: Path) -> ReferenceHSTU:
    """The slow reference over a `research` model directory's own files."""
    reference = load_reference(directory)
    assert isinstance(reference, ReferenceHSTU)
    return reference


def toy_engine_config(
    model_dir: Path,
    *,
    num_pages: int = 24,
    emb_fraction: float = 0.25,
    block_tokens: int = 4,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 8,
    max_num_waiting: int = 1024,
    max_pages_per_step: int | None = None,
) -> EngineConfig:
    """An engine over few pages, with freed memory poisoned."""
    model = load_config(model_dir)
    row_bytes = model.row_dim * 4
    block_bytes = block_tokens * model.kv_elements_per_token * 4
    page_bytes = -(-max(block_bytes, row_bytes) // 256) * 256
    return EngineConfig(
        model_dir,
        pool=PoolConfig(
            pool_bytes=num_pages * page_bytes + max_num_batched_tokens * row_bytes,
            emb_fraction=emb_fraction,
            block_tokens=block_tokens,
        ),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_num_waiting=max_num_waiting,
            max_pages_per_step=max_pages_per_step,
        ),
        poison_freed_memory=True,
    )

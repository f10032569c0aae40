"""Small models with seeded random weights, in which no term is so small that it could hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from block_manager.pool_layout import PoolConfig
from helm_engine.config import EngineConfig, SchedulerConfig
from model_executor.checkpoint import DENSE_FILE, ITEM_TABLE, TABLES_FILE, load_config, save_model
from model_executor.model_config import ModelConfig, parse_model_config
from model_executor.models.hstu import HSTU
from tests.reference_hstu import ReferenceHSTU

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


def toy_config(**changes: Any) -> ModelConfig:
    """The toy configuration, with changes."""
    return parse_model_config({**TOY_CONFIG, **changes}, "toy")


def write_toy_model(directory: Path, config: ModelConfig, seed: int = 0) -> Path:
    """Writes a model directory with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = HSTU(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and tables are as large as scores, so that dropping one is seen.
            scale = 0.5 if "bias" in name else 1.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    table = torch.randn(config.num_items + 1, config.embedding_dim, generator=generator) * 0.3
    table[0] = 0.0
    save_model(directory, model, table)
    return directory


def read_reference(directory: Path) -> ReferenceHSTU:
    """The slow reference over a model directory's own files."""
    weights = load_file(directory / DENSE_FILE)
    table = load_file(directory / TABLES_FILE)[ITEM_TABLE]
    return ReferenceHSTU(
        load_config(directory),
        {name: weight.astype(np.float64) for name, weight in weights.items()},
        table.astype(np.float64),
    )


def toy_engine_config(
    model_dir: Path,
    *,
    num_pages: int = 24,
    emb_fraction: float = 0.25,
    block_tokens: int = 4,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 8,
) -> EngineConfig:
    """An engine over few pages, with freed memory poisoned."""
    model = load_config(model_dir)
    row_bytes = model.embedding_dim * 4
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
            max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
        ),
        poison_freed_memory=True,
    )

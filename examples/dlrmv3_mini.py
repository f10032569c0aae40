"""Makes model directories of the size of a small DLRMv3, with seeded random weights.

    python -m examples.dlrmv3_mini --variant abs --history 640 data/dlrmv3-mini-abs-640

`stu` is DLRMv3's function as published: positions count from the newest event, so nothing is
reused across requests. `abs` has the same sizes in the `nvidia` dialect, positions from the oldest
event, no contextual rows and no action tokens, so a returning user's KV is reused exactly. The
weights mean nothing; shapes, time and memory are those of a trained model. Sizes follow MLPerf
Inference DLRMv3, scaled down: D 128, 3 layers of 4 heads of 32, a million items.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from model_executor.checkpoint import save_model
from model_executor.model_config import ModelConfig, parse_model_config
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel

Variant = Literal["stu", "abs"]

NUM_CANDIDATES = 256
NUM_CATEGORIES = 128
NUM_USERS = 50_000


def mini_config(variant: Variant, history: int, num_items: int = 1_000_000) -> ModelConfig:
    """The configuration of a variant that reads `history` events."""
    common = {
        "model_type": "hstu",
        "dtype": "float32",
        "num_items": num_items,
        "embedding_dim": 128,
        "num_layers": 3,
        "num_heads": 4,
        "dqk": 32,
        "dv": 32,
        "max_sequence_len": history,
        "tasks": [{"name": "rating"}],
    }
    own: dict[Variant, dict[str, Any]] = {
        "stu": {
            "dialect": "stu",
            "truncation": "oldest",
            "layer_norm_eps": 1e-6,
            "table_dim": 128,
            "features": [{"name": "category_id", "num_rows": NUM_CATEGORIES}],
            "contextual": [{"name": "user_id", "num_rows": NUM_USERS, "min_sequence_len": 20}],
            "num_action_bits": 5,
            "max_candidates": NUM_CANDIDATES,
            "num_positions": 8192,
            "num_time_buckets": 2048,
            "preprocessor_hidden_dim": 256,
        },
        "abs": {
            "dialect": "nvidia",
            "layer_norm_eps": 1e-5,
            # A sixteenth of the history is forgotten at once, and KV is reused until then.
            "anchor_stride": max(1, history // 16),
            "num_position_buckets": history + 1,
            "scaling_seqlen": history + NUM_CANDIDATES,
            "prediction_head": [512, 1],
        },
    }
    return parse_model_config(common | own[variant], f"dlrmv3-mini {variant}")


def initialise(model: SequenceModel, generator: torch.Generator) -> None:
    """Norms start as such; everything else is normal, scaled so that rows keep their size."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.02, generator=generator)
            elif "table" in name or "embedding" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(std=min(parameter.shape[-2:]) ** -0.5, generator=generator)


def make_model_dir(directory: Path, config: ModelConfig, seed: int = 1) -> Path:
    """Writes a model directory with seeded weights; returns it."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config)
    initialise(model, generator)
    tables = {
        table.name: torch.empty(table.num_rows, config.row_dim).normal_(
            std=config.row_dim**-0.5, generator=generator
        )
        for table in config.row_tables
    }
    save_model(directory, model, tables)
    return directory


def main() -> None:
    """Writes the model directory named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--history", type=int, default=640, help="events that the model reads")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    config = mini_config(arguments.variant, arguments.history, arguments.items)
    make_model_dir(arguments.directory, config, arguments.seed)
    print(f"{arguments.directory}: {arguments.variant}, {arguments.history} events")


if __name__ == "__main__":
    main()

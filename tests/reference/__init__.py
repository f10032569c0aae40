"""Slow references of all dialects: what the engine's scores are held against.

One file for each dialect, written from its formulas in plain NumPy: one user, no cache, no batch.
They share no code with the engine; config fields and the names of weights are all they know of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import load_file

from model_executor.model_config import (
    ModelConfig,
    NvidiaConfig,
    ResearchConfig,
    StuConfig,
    read_model_config,
)
from tests.reference.formulas import Array, Weights
from tests.reference.nvidia import ReferenceNvidia
from tests.reference.request import Body
from tests.reference.research import ReferenceHSTU
from tests.reference.sasrec import ReferenceSASRec
from tests.reference.stu import ReferenceStu

__all__ = [
    "Reference",
    "ReferenceHSTU",
    "ReferenceNvidia",
    "ReferenceSASRec",
    "ReferenceStu",
    "load_reference",
    "reference_of",
]


class Reference(Protocol):
    """The scores of one model."""

    def answer(self, body: Body) -> Array:
        """Scores of a request's candidates; without any, of all items: [C, tasks]."""
        ...


def load_reference(directory: Path, relative_error: float = 0.0, seed: int = 0) -> Reference:
    """The reference over a model directory's own files.

    Args:
        directory: the model's.
        relative_error: of each weight, up or down at random: what rounding does to scores.
        seed: of the directions.
    """
    rng = np.random.default_rng(seed)

    def read(file: str) -> dict[str, Array]:
        tensors = load_file(directory / file)
        return {
            name: tensor * (1.0 + relative_error * rng.choice([-1.0, 1.0], tensor.shape))
            for name, tensor in tensors.items()
        }

    config = read_model_config(directory / "config.json")
    return reference_of(config, read("model.safetensors"), read("tables.safetensors"))


def reference_of(
    config: ModelConfig, dense: dict[str, Array], tables: dict[str, Array]
) -> Reference:
    """The reference over float64 weights and tables."""
    if isinstance(config, ResearchConfig):
        return ReferenceHSTU(config, dense, tables["item_embedding"])
    if isinstance(config, StuConfig):
        return ReferenceStu(config, Weights(dense), tables)
    if isinstance(config, NvidiaConfig):
        return ReferenceNvidia(config, Weights(dense), tables)
    return ReferenceSASRec(config, Weights(dense), tables["item_embedding"])

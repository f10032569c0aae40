"""From a checkpoint's tensors to a model's weights, by a table of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model_executor.converters.errors import CheckpointError
from model_executor.converters.state_dict import StateDict
from model_executor.converters.tables import Table, check_tensor, copy_rows
from model_executor.model_config import ModelConfig, NvidiaConfig, ResearchConfig, StuConfig
from model_executor.models.registry import build_model


@dataclass(frozen=True, slots=True)
class Theirs:
    """Where a weight of ours is in a checkpoint, and how its numbers are laid out there."""

    name: str
    transposed: bool = False
    heads: int = 0
    """Rows are grouped [u v q k] of head 0, then of head 1, ...; 0 = already [u | v | q | k]."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted model; its pooled tables are still in the checkpoint."""

    config: ResearchConfig | StuConfig | NvidiaConfig
    weights: Mapping[str, Tensor]
    """Dense weights, float32, by their names in our model."""
    tables: Mapping[str, Table]
    """Tables of the pool by their names in our files."""
    dropped: Mapping[str, str]
    """What of the checkpoint is not in them, and why, by name."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


def dense_weights(
    config: ModelConfig,
    state: StateDict,
    names: Mapping[str, Theirs],
    small_tables: Mapping[str, Table],
) -> dict[str, Tensor]:
    """All dense weights of our model.

    Args:
        config: of the model.
        state: tensors of the checkpoint; those of `names` are taken.
        names: where each of our weights is.
        small_tables: weights of ours that are tables of the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape, or is not finite.
    """
    with torch.device("meta"):
        wanted = build_model(config).state_dict()
    weights = {}
    for ours, like in wanted.items():
        weight = torch.empty(like.shape, dtype=torch.float32)
        if ours in small_tables:
            table = small_tables[ours]
            _check_shape(table.label, table.shape, tuple(like.shape))
            table.fill(weight)
        else:
            _fill(weight, state, names[ours])
        weights[ours] = weight
    return weights


def _fill(weight: Tensor, state: StateDict, theirs: Theirs) -> None:
    label = state.label(theirs.name)
    tensor = check_tensor(state.take(theirs.name), label)
    shape = tuple(weight.shape)
    _check_shape(label, tuple(tensor.shape), shape[::-1] if theirs.transposed else shape)
    if theirs.heads:
        # [heads, 4 parts, width, ...] to [4 parts, heads, width, ...]
        grouped = tensor.reshape(theirs.heads, 4, -1, *tensor.shape[1:])
        tensor = grouped.transpose(0, 1).reshape(tensor.shape)
    copy_rows(weight, tensor.T if theirs.transposed else tensor, label)


def _check_shape(label: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise CheckpointError(f"{label}: has shape {list(found)}, the model needs {list(wanted)}")


def divide(state: StateDict, name: str, width: int, parts: int, what: str) -> int:
    """A width split evenly.

    Raises:
        CheckpointError: it cannot be split; names the tensor and what it was split among.
    """
    if width < parts or width % parts:
        raise state.error(name, f"its width {width} cannot be split among {what}")
    return width // parts

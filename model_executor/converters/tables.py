"""Embedding tables of a checkpoint, which may be far larger than memory: copied piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model_executor.converters.errors import CheckpointError
from model_executor.converters.torch_checkpoint import ShardedPlaceholder

_PIECE_ELEMENTS = 1 << 22
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What float32 holds without loss."""


Advance = Callable[[int], None]
"""Told how many numbers were written since it was last told; conversions can take minutes."""


def unwatched(_: int) -> None:
    """An `Advance` for which nobody waits."""


class Table(Protocol):
    """A table of float rows somewhere in a checkpoint."""

    @property
    def label(self) -> str:
        """File and name, for messages."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and their width."""
        ...

    def fill(self, target: Tensor, advance: Advance = unwatched) -> None:
        """Writes all rows into a float32 tensor of the table's shape.

        Raises:
            CheckpointError: a file is damaged, or a value is not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class TensorTable:
    """A table that the checkpoint holds as one tensor, perhaps memory-mapped."""

    label: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and their width."""
        rows, width = self.tensor.shape
        return rows, width

    def fill(self, target: Tensor, advance: Advance = unwatched) -> None:
        """Writes all rows; see `Table`."""
        copy_rows(target, self.tensor, self.label, advance)


def check_plain(value: object, label: str) -> Tensor:
    """The value as a tensor of its own values.

    Raises:
        CheckpointError: it is no tensor, or one whose values are elsewhere.
    """
    if isinstance(value, ShardedPlaceholder):
        raise CheckpointError(f"{label}: is sharded over ranks, its values are elsewhere")
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(f"{label}: is a {type(value).__name__}, not a plain tensor")
    assert isinstance(value, Tensor)
    return value.detach()


def check_tensor(value: object, label: str) -> Tensor:
    """The value as a plain tensor of floats.

    Raises:
        CheckpointError: it is none, or its dtype is not one that float32 holds.
    """
    value = check_plain(value, label)
    if value.layout != torch.strided or value.dtype not in _DTYPES:
        raise CheckpointError(
            f"{label}: is {value.dtype}, {value.layout}; must be dense floats of at most 32 bits"
        )
    return value


def copy_rows(target: Tensor, rows: Tensor, label: str, advance: Advance = unwatched) -> None:
    """Copies rows into float32, a few at a time.

    Raises:
        CheckpointError: a value is not finite.
    """
    step = max(1, _PIECE_ELEMENTS // max(1, rows[:1].numel()))
    for first in range(0, len(rows), step):
        piece = rows[first : first + step].to(torch.float32)
        if not bool(torch.isfinite(piece).all()):
            raise CheckpointError(f"{label}: holds values that are not finite")
        target[first : first + step] = piece
        advance(piece.numel())


def item_table(names: Collection[str], feature_names: Collection[str], source: str) -> str:
    """The one table that is no feature's.

    Args:
        names: all tables of the checkpoint.
        feature_names: those that the config gives another role.
        source: of the tables, for messages.

    Raises:
        CheckpointError: a feature has no table, or not exactly one table is left.
    """
    for name in sorted(set(feature_names) - set(names)):
        raise CheckpointError(f"{source}: there is no table {name!r}, which the config names")
    left = sorted(set(names) - set(feature_names))
    if len(left) != 1:
        found = ", ".join(map(repr, left)) or "none"
        raise CheckpointError(
            f"{source}: of the tables that the config names no feature for, one must be left, the "
            f"items'; left: {found}"
        )
    return left[0]


def tensor_table(value: object, label: str) -> TensorTable:
    """A tensor as a table.

    Raises:
        CheckpointError: it is no matrix of floats.
    """
    tensor = check_tensor(value, label)
    if tensor.ndim != 2:
        raise CheckpointError(f"{label}: has shape {list(tensor.shape)}, not two dimensions")
    return TensorTable(label, tensor)


def check_width(tables: Mapping[str, Table], width: int) -> None:
    """Refuses tables of another width.

    Raises:
        CheckpointError: names the table.
    """
    for table in tables.values():
        if table.shape[1] != width:
            raise CheckpointError(
                f"{table.label}: has rows of {table.shape[1]} numbers, the model reads {width}"
            )

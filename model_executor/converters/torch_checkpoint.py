"""Reads files of `torch.save`; code that they may hold never runs.

torch's own restricted unpickler admits tensors and plain values. Checkpoints of multi-rank
training also hold tables as `ShardedTensor`: those are read as inert objects without values.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from model_executor.converters.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
"""How files of torch.save begin since torch 1.6; only those can be memory-mapped."""


class ShardedPlaceholder(Tensor):
    """In place of a `ShardedTensor`, whose values are spread over ranks: it has none."""

    def __setstate__(self, state: object) -> None:
        """Forgets the shards."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub lacks the function
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> Any:
        """Nothing can be computed of it."""
        raise TypeError("a sharded tensor's values are not in this file")


class _Inert:
    """In place of what a `ShardedTensor` consists of."""

    def __init__(self, *args: object) -> None:
        """Takes and forgets anything."""

    def __setstate__(self, state: object) -> None:
        """Forgets it."""


def _inert_attribute(*args: object) -> type[_Inert]:
    """In place of `getattr`, which such a pickle names a nested class with: never looks up."""
    return _Inert


_SHARD = "torch.distributed._shard"
_STAND_INS: list[Any] = [
    (ShardedPlaceholder, f"{_SHARD}.sharded_tensor.api.ShardedTensor"),
    (_Inert, f"{_SHARD}.sharded_tensor.metadata.MEM_FORMAT_ENCODING"),
    (_Inert, f"{_SHARD}.sharded_tensor.metadata.ShardedTensorMetadata"),
    (_Inert, f"{_SHARD}.sharded_tensor.metadata.TensorProperties"),
    (_Inert, f"{_SHARD}.sharded_tensor.shard.Shard"),
    (_Inert, f"{_SHARD}.metadata.ShardMetadata"),
    (_Inert, f"{_SHARD}.sharding_spec.api.EnumerableShardingSpec"),
    (_Inert, f"{_SHARD}.sharding_spec.chunk_sharding_spec.ChunkShardingSpec"),
    (_Inert, "torch.distributed.remote_device._remote_device"),
    (_inert_attribute, "builtins.getattr"),
]
"""What a file may name beyond torch's own list; the named things themselves are never used."""


def load_torch_file(path: Path) -> dict[Any, Any]:
    """Reads the dictionary that a file holds; its tensors are memory-mapped where possible.

    Raises:
        CheckpointError: the file cannot be read, holds anything but tensors and plain values, or
            no dictionary.
    """
    try:
        with path.open("rb") as file:
            mappable = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    with torch.serialization.safe_globals(_STAND_INS):
        loaded = _load(path, str(path), mmap=mappable)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, must hold a dictionary")
    return loaded


def load_torch_stream(stream: IO[bytes], name: str) -> Tensor:
    """Reads the one tensor that a stream holds.

    Raises:
        CheckpointError: as `load_torch_file`; names `name`.
    """
    loaded = _load(stream, name, mmap=False)
    if type(loaded) is not Tensor:
        raise CheckpointError(f"{name}: holds a {type(loaded).__name__}, must hold a tensor")
    return loaded


def _load(source: Path | IO[bytes], name: str, *, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            # About unusual pickle protocols; what cannot be read is an error below.
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # A damaged pickle makes torch raise almost anything.
        raise CheckpointError(f"{name}: cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Torch's reason in one line, less its advice to load the file without the restriction."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"it names {named[1]}; only tensors and plain values are read"
    if "Weights only" in str(error):
        return "it holds more than tensors and plain values"
    return (str(error).splitlines() or [type(error).__name__])[0]

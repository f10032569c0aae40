"""Reads the `.metadata` pickle of a torch distributed checkpoint; code in it never runs.

The unpickler looks up nothing: the few names that such a file needs stand for inert classes of
this module, dtypes for their names, and every other name is refused. Names and attributes are
those of torch/distributed/checkpoint/metadata.py and filesystem.py, and for files of torch before
2.3 of torch/distributed/_shard/sharded_tensor/metadata.py.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_executor.converters.errors import CheckpointError


class Record:
    """An object of the file: its attributes, and nothing else."""

    def __init__(self, *args: object) -> None:
        """Forgets the arguments: records that matter come without any."""

    def __setstate__(self, state: object) -> None:
        """Keeps the attributes, if the state is a dictionary of them."""
        if isinstance(state, dict):
            self.__dict__.update(state)


def attribute(record: Record, name: str) -> Any:
    """An attribute as the file has it, or None."""
    # Not through the object: a file could name an attribute like a method.
    return vars(record).get(name)


class Metadata(Record):
    """The whole file: `state_dict_metadata`, `storage_data` and what is not read."""


class TensorMetadata(Record):
    """One tensor: its `size` and its `chunks`."""


class BytesMetadata(Record):
    """One item that is no tensor."""


class ChunkMetadata(Record):
    """One shard of a tensor: its `offsets` and `sizes`."""


class MetadataIndex(Record):
    """Key of `storage_data`: `fqn` and, for a shard, its `offset`."""


class StorageInfo(Record):
    """Where an item is: `relative_path`, `offset`, `length`, perhaps `transform_descriptors`."""


_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")

_ADMITTED: Mapping[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): Metadata,
    (_METADATA, "TensorStorageMetadata"): TensorMetadata,
    (_METADATA, "BytesStorageMetadata"): BytesMetadata,
    (_METADATA, "ChunkStorageMetadata"): ChunkMetadata,
    (_METADATA, "MetadataIndex"): MetadataIndex,
    (_FILESYSTEM, "_StorageInfo"): StorageInfo,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    # Read past.
    (_METADATA, "StorageMeta"): Record,
    (_METADATA, "TensorProperties"): Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Record,
    (_FILESYSTEM, "_StoragePrefix"): Record,
    (_OLDER, "TensorProperties"): Record,
    (_OLDER, "MEM_FORMAT_ENCODING"): Record,
    ("torch", "device"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "WindowsPath"): Record,
    ("pathlib._local", "PosixPath"): Record,
    ("pathlib._local", "WindowsPath"): Record,
    **{("torch", name): name for name in (*_DTYPES, "bool")},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles stand-ins for the admitted names, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of the file."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise CheckpointError(
                f"it names {module}.{name}, which a checkpoint's metadata does not need"
            ) from None


def read_metadata(path: Path) -> Metadata:
    """Reads a `.metadata` file.

    Raises:
        CheckpointError: it cannot be read, or names anything that no such file needs.
    """
    try:
        with path.open("rb") as file:
            loaded = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # A damaged pickle raises almost anything.
        reason = str(error) if isinstance(error, CheckpointError) else "it is damaged"
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(loaded, Metadata):
        raise CheckpointError(f"{path}: is no metadata of a distributed checkpoint")
    return loaded

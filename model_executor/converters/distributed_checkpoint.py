"""Tables in a torch distributed checkpoint: `.metadata` and `*.distcp` files, read shard by shard.

Layout as torch/distributed/checkpoint/filesystem.py writes it: the metadata says which shards make
up a tensor and where in which file each is; there it is a whole file of `torch.save`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from model_executor.converters.errors import CheckpointError
from model_executor.converters.restricted_pickle import (
    ChunkMetadata,
    Metadata,
    MetadataIndex,
    Record,
    StorageInfo,
    TensorMetadata,
    attribute,
    read_metadata,
)
from model_executor.converters.tables import Advance, check_tensor, copy_rows, unwatched
from model_executor.converters.torch_checkpoint import load_torch_stream

METADATA_FILE = ".metadata"

_Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A rectangle of a table, and the bytes of a file that hold it."""

    first: _Pair
    size: _Pair
    path: Path
    offset: int
    length: int

    @property
    def slices(self) -> tuple[slice, slice]:
        (row, column), (rows, columns) = self.first, self.size
        return slice(row, row + rows), slice(column, column + columns)

    def overlaps(self, other: _Shard) -> bool:
        return all(
            max(self.first[axis], other.first[axis])
            < min(self.first[axis] + self.size[axis], other.first[axis] + other.size[axis])
            for axis in (0, 1)
        )


@dataclass(frozen=True, slots=True)
class ShardedTable:
    """A table in shards, of which one at a time is in memory; see `Table`."""

    label: str
    shape: _Pair
    shards: tuple[_Shard, ...]

    def fill(self, target: Tensor, advance: Advance = unwatched) -> None:
        """Writes all shards to their places; see `Table`."""
        for shard in self.shards:
            label = f"{self.label} at {list(shard.first)}"
            with shard.path.open("rb") as file:
                view = io.BufferedReader(_FileSlice(file, shard.offset, shard.length))
                tensor = check_tensor(load_torch_stream(view, label), label)
            if tuple(tensor.shape) != shard.size:
                raise CheckpointError(
                    f"{label}: has shape {list(tensor.shape)}, the metadata says {list(shard.size)}"
                )
            copy_rows(target[shard.slices], tensor, label, advance)


class _FileSlice(io.RawIOBase):
    """Some bytes of a file as a file of their own, so that a shard is never in memory twice."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length = file, offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._place))
        self._file.seek(self._offset + self._place)
        read = self._file.readinto(memoryview(buffer)[:wanted])
        self._place += read
        return read


def read_tables(directory: Path) -> dict[str, ShardedTable]:
    """All tensors of a checkpoint by name; their files are checked, but not yet read.

    Raises:
        CheckpointError: the metadata is damaged, an item is no matrix, or its shards do not make
            up a whole.
    """
    path = directory / METADATA_FILE
    metadata = read_metadata(path)
    try:
        places = dict(_places(metadata, directory))
        return {
            name: _table(directory, name, item, places)
            for name, item in attribute(metadata, "state_dict_metadata").items()
        }
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # A file of some other shape than torch writes.
        raise CheckpointError(f"{path}: is damaged: {error!r}") from error


def _places(metadata: Metadata, directory: Path) -> Iterator[tuple[Any, tuple[Path, int, int]]]:
    """File, offset and length by name and first row and column."""
    for index, info in attribute(metadata, "storage_data").items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, StorageInfo):
            raise CheckpointError("storage_data: holds something else than torch writes")
        name, relative = attribute(index, "fqn"), attribute(info, "relative_path")
        if not isinstance(relative, str) or Path(relative).name != relative:
            raise CheckpointError(f"{name}: {relative!r} is not a file beside the metadata")
        if attribute(info, "transform_descriptors"):
            raise CheckpointError(f"{name}: is compressed or encrypted, which is not supported")
        path, length = directory / relative, int(attribute(info, "length"))
        offset = int(attribute(info, "offset"))
        if not path.is_file():
            raise CheckpointError(f"{name}: {relative!r} is not there")
        if offset < 0 or length < 0 or offset + length > path.stat().st_size:
            raise CheckpointError(f"{name}: reaches beyond the end of {relative!r}")
        first = attribute(index, "offset")
        yield (name, None if first is None else tuple(first)), (path, offset, length)


def _table(
    directory: Path, name: str, item: Record, places: dict[Any, tuple[Path, int, int]]
) -> ShardedTable:
    if not isinstance(item, TensorMetadata):
        raise CheckpointError(f"{name!r}: is no tensor")
    size = _pair(name, attribute(item, "size"))
    shards = tuple(_shard(name, chunk, places) for chunk in attribute(item, "chunks"))
    inside = all(
        first + length <= whole
        for shard in shards
        for first, length, whole in zip(shard.first, shard.size, size, strict=True)
    )
    covered = sum(math.prod(shard.size) for shard in shards)
    if (
        not inside
        or covered != math.prod(size)
        or any(one.overlaps(other) for one, other in combinations(shards, 2))
    ):
        raise CheckpointError(f"{name!r}: its shards do not make up {list(size)}")
    return ShardedTable(f"{directory}: tensor {name!r}", size, shards)


def _shard(name: str, chunk: Record, places: dict[Any, tuple[Path, int, int]]) -> _Shard:
    if not isinstance(chunk, ChunkMetadata):
        raise CheckpointError(f"{name!r}: its chunks are something else than torch writes")
    first = _pair(name, attribute(chunk, "offsets"))
    try:
        path, offset, length = places[name, first]
    except KeyError:
        raise CheckpointError(f"{name!r}: the shard at {list(first)} is in no file") from None
    return _Shard(first, _pair(name, attribute(chunk, "sizes")), path, offset, length)


def _pair(name: str, value: Any) -> _Pair:
    if len(value) != 2:
        raise CheckpointError(f"{name!r}: has shape {list(value)}, not two dimensions")
    first, second = int(value[0]), int(value[1])
    if min(first, second) < 0:
        raise CheckpointError(f"{name!r}: has a negative size or place")
    return first, second

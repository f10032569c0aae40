"""The readers of foreign files: what they read right, and what they refuse."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the "fake" process group
from safetensors.torch import load_file
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from model_executor.checkpoint import TABLES_FILE, map_tables
from model_executor.converters.convert import convert_checkpoint
from model_executor.converters.distributed_checkpoint import read_tables
from model_executor.converters.dynamicemb import DumpedTable, find_dumps
from model_executor.converters.errors import CheckpointError
from model_executor.converters.tables import TensorTable
from model_executor.converters.tables_file import write_tables
from model_executor.converters.torch_checkpoint import (
    ShardedPlaceholder,
    load_torch_file,
    load_torch_stream,
)
from tests.model_executor.golden_checkpoints import (
    COLLECTION,
    dump_table,
    fused_state,
    nvidia_tables,
    save_distributed,
    write_config,
    write_nvidia,
)
from tests.toy_models import toy_config, write_toy_model

NAME = "_embedding_collection.embeddings.item.weight"


def table(rows: int = 40, width: int = 6) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- files of torch.save


def test_a_file_without_a_dictionary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_torch_file(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", os.urandom(999)])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.pth: cannot be read: ."):
        load_torch_file(path)


def test_files_of_older_torch_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_torch_file(path)["x"], torch.ones(2))


def test_only_a_plain_tensor_is_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"x": 1}, path)
    with path.open("rb") as file, pytest.raises(CheckpointError, match="must hold a tensor"):
        load_torch_stream(file, "shard")


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone, without a network."""
    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That sharded tensors are old.
            yield
    finally:
        dist.destroy_process_group()


def sharded(whole: Tensor, places: list[tuple[int, int, int, int]]) -> ShardedTensor:
    """A tensor in shards: first row, first column, rows, columns."""
    metadata = [
        ShardMetadata([row, column], [rows, columns], "rank:0/cpu")
        for row, column, rows, columns in places
    ]
    shards = [
        Shard(whole[row : row + rows, column : column + columns].contiguous(), one)
        for (row, column, rows, columns), one in zip(places, metadata, strict=True)
    ]
    properties = TensorProperties(dtype=whole.dtype)
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, ShardedTensorMetadata(metadata, whole.shape, properties)
    )


def test_a_sharded_tensor_is_read_as_one_without_values(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with process_group():
        torch.save({"plain": table(), "sharded": sharded(table(), [(0, 0, 40, 6)])}, path)
    loaded = load_torch_file(path)
    assert torch.equal(loaded["plain"], table())
    assert isinstance(loaded["sharded"], ShardedPlaceholder)
    with pytest.raises(TypeError):
        loaded["sharded"].sum()


def test_a_sharded_tensor_needs_its_table_in_a_file(tmp_path: Path) -> None:
    tables, name = nvidia_tables(), COLLECTION.format("model", "item.weight")
    with process_group():
        state = {**fused_state(), name: sharded(torch.zeros(1, 1), [(0, 0, 1, 1)])}
        small = {one: tables[one] for one in tables if one != "item"}
        source = write_nvidia(tmp_path, state, small)
    config = write_config(tmp_path, "nvidia_ranking")
    with pytest.raises(CheckpointError, match=r"item\.weight': is sharded over ranks"):
        convert_checkpoint("nvidia", source, tmp_path / "model", config)
    dump_table(source, "item", list(range(70)), tables["item"])
    conversion = convert_checkpoint("nvidia", source, tmp_path / "model", config)
    assert conversion.dropped[name] == "a stand-in, the table is in a file of its own"


# ---------------------------------------------------------------- distributed checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "places",
    [
        [(0, 0, 40, 6)],
        [(0, 0, 15, 6), (15, 0, 20, 6), (35, 0, 5, 6)],
        [(0, 0, 40, 2), (0, 2, 40, 4)],
        [(0, 0, 10, 6), (10, 0, 30, 3), (10, 3, 30, 3)],
    ],
)
def test_shards_make_up_the_table(
    tmp_path: Path, places: list[tuple[int, int, int, int]], dtype: torch.dtype
) -> None:
    whole = table().to(dtype)
    with process_group():
        save_distributed(tmp_path, {NAME: sharded(whole, places), "other": table(7, 3)})
    found = read_tables(tmp_path)
    assert found.keys() == {f"sparse_dict.{NAME}", "sparse_dict.other"}
    read = found[f"sparse_dict.{NAME}"]
    assert len(read.shards) == len(places)
    target = torch.empty(40, 6)
    read.fill(target)
    assert torch.equal(target, whole.float())


def damaged(directory: Path, change: Callable[[Any], None]) -> None:
    """Saves a table, then changes the metadata."""
    save_distributed(directory, {NAME: table()})
    path = directory / ".metadata"
    index = MetadataIndex(f"sparse_dict.{NAME}", [0, 0])
    metadata = FileSystemReader(directory).read_metadata()
    change((metadata, metadata.storage_data[index]))
    path.write_bytes(pickle.dumps(metadata))


def _move(parts: Any) -> None:
    parts[1].relative_path = "../__0_0.distcp"


def _elsewhere(parts: Any) -> None:
    parts[1].relative_path = "gone.distcp"


def _lengthen(parts: Any) -> None:
    parts[1].length += 1


def _compress(parts: Any) -> None:
    parts[1].transform_descriptors = ["zstd"]


def _overlap(parts: Any) -> None:
    (item,) = parts[0].state_dict_metadata.values()
    item.chunks = [*item.chunks, *item.chunks]


def _outside(parts: Any) -> None:
    (item,) = parts[0].state_dict_metadata.values()
    item.size = torch.Size([39, 6])


def _gap(parts: Any) -> None:
    (item,) = parts[0].state_dict_metadata.values()
    item.size = torch.Size([41, 6])


def _three_dimensions(parts: Any) -> None:
    (item,) = parts[0].state_dict_metadata.values()
    item.size = torch.Size([40, 3, 2])


def _nowhere(parts: Any) -> None:
    parts[0].storage_data.clear()


def _no_data(parts: Any) -> None:
    parts[0].storage_data = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_move, "is not a file beside the metadata"),
        (_elsewhere, "'gone.distcp' is not there"),
        (_lengthen, "reaches beyond the end"),
        (_compress, "is compressed or encrypted"),
        (_overlap, "its shards do not make up"),
        (_outside, "its shards do not make up"),
        (_gap, "its shards do not make up"),
        (_three_dimensions, "not two dimensions"),
        (_nowhere, "is in no file"),
        (_no_data, "is damaged"),
    ],
)
def test_damaged_metadata_is_refused(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"\.metadata: .*{message}"):
        read_tables(tmp_path)


def test_shards_of_another_shape_are_refused(tmp_path: Path) -> None:
    def shrink(parts: Any) -> None:
        (name,) = parts[0].state_dict_metadata
        chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([39, 6]))
        properties = parts[0].state_dict_metadata[name].properties
        parts[0].state_dict_metadata[name] = TensorStorageMetadata(
            properties, torch.Size([39, 6]), [chunk]
        )

    damaged(tmp_path, shrink)
    (read,) = read_tables(tmp_path).values()
    with pytest.raises(CheckpointError, match=r"has shape \[40, 6\], the metadata says \[39, 6\]"):
        read.fill(torch.empty(39, 6))


def test_attributes_of_a_record_hide_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    metadata = Metadata({})
    metadata.__dict__.update(get=1, __class__=2, __setstate__=3)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_tables(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x80\x04}.", os.urandom(99)])
def test_other_files_are_no_metadata(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: "):
        read_tables(tmp_path)


# ---------------------------------------------------------------- dynamicemb


def read_dump(source: Path, rows: int = 40) -> Tensor:
    target = torch.full((rows, 6), torch.nan)
    (dump,) = find_dumps(source / "dynamicemb_module").values()
    DumpedTable(dump, (rows, 6)).fill(target)
    return target


@pytest.mark.parametrize("ranks", [1, 3])
def test_dump_becomes_rows_by_id(tmp_path: Path, ranks: int) -> None:
    dump_table(tmp_path, "item", [39, 3, 0, 12, 5], table(), ranks)
    expected = torch.zeros(40, 6)
    expected[[39, 3, 0, 12, 5]] = table()[[39, 3, 0, 12, 5]]
    assert torch.equal(read_dump(tmp_path), expected)


def files_of(source: Path) -> dict[str, Path]:
    return {path.name: path for path in source.rglob("item_*")}


def _append_key(source: Path, key: int) -> None:
    path = files_of(source)["item_emb_keys.rank_0.world_size_1"]
    path.write_bytes(path.read_bytes() + struct.pack("<q", key))
    values = files_of(source)["item_emb_values.rank_0.world_size_1"]
    values.write_bytes(values.read_bytes() + np.ones(6, dtype="<f4").tobytes())


def _duplicate(source: Path) -> None:
    _append_key(source, 3)


def _beyond(source: Path) -> None:
    _append_key(source, 40)


def _negative(source: Path) -> None:
    _append_key(source, -1)


def _cut_keys(source: Path) -> None:
    path = files_of(source)["item_emb_keys.rank_0.world_size_1"]
    path.write_bytes(path.read_bytes()[:-1])


def _cut_values(source: Path) -> None:
    path = files_of(source)["item_emb_values.rank_0.world_size_1"]
    path.write_bytes(path.read_bytes()[:-4])


def _not_finite(source: Path) -> None:
    path = files_of(source)["item_emb_values.rank_0.world_size_1"]
    path.write_bytes(np.full(18, np.inf, dtype="<f4").tobytes())


def _lose_values(source: Path) -> None:
    files_of(source)["item_emb_values.rank_0.world_size_1"].unlink()


def _lose_a_rank(source: Path) -> None:
    for name, path in files_of(source).items():
        path.rename(path.with_name(name.replace("world_size_1", "world_size_2")))


def _add_a_file(source: Path) -> None:
    (source / "dynamicemb_module" / "item_keys.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_duplicate, "an id has two rows"),
        (_beyond, "id 40 is outside the 40 rows"),
        (_negative, "id -1 is outside the 40 rows"),
        (_cut_keys, "is cut short"),
        (_cut_values, "must hold 3 rows of 6 numbers"),
        (_not_finite, "not finite"),
        (_lose_values, "are not one of keys and one of values"),
        (_lose_a_rank, "from each of 2 ranks"),
        (_add_a_file, "is no file of a dynamicemb dump"),
    ],
)
def test_damaged_dump_is_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    dump_table(tmp_path, "item", [3, 0, 12], table(), ranks=1)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_dump(tmp_path)


# ---------------------------------------------------------------- tables.safetensors


def test_written_tables_are_those_that_save_model_writes(tmp_path: Path) -> None:
    config = toy_config("stu")
    write_toy_model(tmp_path / "saved", config)
    tables = load_file(tmp_path / "saved" / TABLES_FILE)
    (tmp_path / "written").mkdir()
    write_tables(
        tmp_path / "written" / TABLES_FILE,
        {name: TensorTable(name, one) for name, one in tables.items()},
    )
    saved, written = (map_tables(tmp_path / name, config) for name in ("saved", "written"))
    assert len(written) == 2
    for one, other in zip(saved, written, strict=True):
        np.testing.assert_array_equal(one, other)

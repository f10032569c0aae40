"""Where the embedding tables of an NVIDIA checkpoint are: four places, each with its own form.

Names: `ShardedEmbedding` and `DataParallelEmbeddingCollection` in
examples/commons/modules/embedding.py of NVIDIA/recsys-examples at commit 43465ae.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_executor.converters.dynamicemb import Dump, DumpedTable, find_dumps
from model_executor.converters.errors import CheckpointError
from model_executor.converters.state_dict import StateDict
from model_executor.converters.tables import (
    Table,
    TensorTable,
    check_tensor,
    check_width,
    tensor_table,
)

TABLES_FILE = "tables.safetensors"
DUMPS_DIRECTORY = "dynamicemb_module"

_COLLECTION = r"_embedding_collection\._{}_parallel_embedding_collection\.embeddings\."
_DATA_PARALLEL = _COLLECTION.format("data") + r"(.+)_weights"
"""One tensor for all such tables: their names are joined by slashes, their rows laid end to end."""
_MODEL_PARALLEL = _COLLECTION.format("model") + r"([^.]+)\.weight"


@dataclass(slots=True)
class TableFiles:
    """The tables by name, before their sizes are known."""

    width: int
    whole: dict[str, Table] = field(default_factory=dict)
    packed: dict[tuple[str, ...], TensorTable] = field(default_factory=dict)
    """Several tables whose rows lie end to end in one."""
    dumps: dict[str, Dump] = field(default_factory=dict)

    @property
    def names(self) -> Collection[str]:
        """Of all tables."""
        return [*self.whole, *self.unsized]

    @property
    def unsized(self) -> Collection[str]:
        """Names of the tables whose number of rows no file says."""
        return [*(name for group in self.packed for name in group), *self.dumps]

    def open(self, rows: Mapping[str, int | None]) -> dict[str, Table]:
        """All tables.

        Args:
            rows: number of rows by name; needed for the unsized ones.

        Raises:
            CheckpointError: a table has rows of another width, or the rows of packed tables are
                not as many as there are.
        """
        tables = dict(self.whole)
        for names, packed in self.packed.items():
            sizes = [rows[name] or 0 for name in names]
            if sum(sizes) != packed.shape[0]:
                raise CheckpointError(
                    f"{packed.label}: has {packed.shape[0]} rows, the config gives "
                    f"these tables {' + '.join(map(str, sizes))}"
                )
            parts = packed.tensor.split(sizes)
            for name, part in zip(names, parts, strict=True):
                tables[name] = TensorTable(packed.label, part)
        for name, dump in self.dumps.items():
            tables[name] = DumpedTable(dump, (rows[name] or 0, self.width))
        check_width(tables, self.width)
        return tables

    def notes(self, rows: Mapping[str, int]) -> tuple[str, ...]:
        """What the dumps leave open."""
        return tuple(
            f"table {name}: {dump.num_keys} of {rows[name]} ids have a row, the others are zeros"
            for name, dump in self.dumps.items()
        )


def read_table_files(source: Path, state: StateDict, width: int) -> TableFiles:
    """Finds all tables of a checkpoint.

    Args:
        source: the checkpoint's directory.
        state: the dense part; tables in it are taken.
        width: of a row.

    Raises:
        CheckpointError: a file is damaged, a table is in two places, or its values are in none.
    """
    files = TableFiles(width, dumps=find_dumps(source / DUMPS_DIRECTORY))
    for name, table in _given_tables(source / TABLES_FILE).items():
        _check_new(files, name, f"{source / TABLES_FILE}")
        files.whole[name] = table
    for match in state.names(_MODEL_PARALLEL):
        if match[1] in files.names and not _is_table(state.value(match[0]), width):
            state.drop(match[0], "a stand-in, the table is in a file of its own")
        else:
            _check_new(files, match[1], state.label(match[0]))
            files.whole[match[1]] = tensor_table(state.take(match[0]), state.label(match[0]))
    for match in state.names(_DATA_PARALLEL):
        names = tuple(match[1].split("/"))
        for name in names:
            _check_new(files, name, state.label(match[0]))
        flat = check_tensor(state.take(match[0]), state.label(match[0])).reshape(-1)
        if len(flat) % width:
            raise state.error(match[0], f"holds no rows of {width} numbers")
        packed = TensorTable(state.label(match[0]), flat.unflatten(0, (-1, width)))
        if len(names) == 1:
            files.whole[names[0]] = packed
        else:
            files.packed[names] = packed
    return files


def _is_table(value: object, width: int) -> bool:
    """Whether it holds rows: for a table in a dump, the state dict has a tensor without any."""
    return type(value) is Tensor and value.ndim == 2 and value.shape[1] == width


def _check_new(files: TableFiles, name: str, place: str) -> None:
    if name in files.names:
        raise CheckpointError(f"{place}: table {name!r} is in another file as well")


def _given_tables(path: Path) -> dict[str, TensorTable]:
    """Tables of the file that the user may add."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {
                name: tensor_table(file.get_tensor(name), f"{path}: tensor {name!r}")
                for name in names
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error

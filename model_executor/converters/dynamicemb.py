"""Tables that NVIDIA's dynamicemb has dumped: hash tables from ids to rows, in flat files.

Layout: `DynamicEmbDump` (dump_load.py), `encode_checkpoint_file_path`
(batched_dynamicemb_tables.py) and `_dump_table` (key_value_table.py) in
corelib/dynamicemb/dynamicemb of NVIDIA/recsys-examples at commit 43465ae:

<collection>/<table>_emb_keys.rank_<r>.world_size_<w>       ids, int64
<collection>/<table>_emb_values.rank_<r>.world_size_<w>     their rows, float32
and per table scores, optimizer state, counters and a JSON file, which belong to training.

An id without a row counts as zeros there, unless the training code set another constant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_executor.converters.errors import CheckpointError
from model_executor.converters.tables import Advance, unwatched

_KEY_BYTES = 8
_VALUE_BYTES = 4
_PIECE_ROWS = 1 << 16
_PART = re.compile(r"(.+)_emb_(keys|values)\.rank_(\d+)\.world_size_(\d+)")
_OF_TRAINING = re.compile(
    r".+_emb_(scores|opt_values)\.rank_\d+\.world_size_\d+"
    r"|.+_counter_(keys|frequencies)\.rank_\d+\.world_size_\d+"
    r"|.+_opt_args\.json"
)


Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Dump:
    """The files of one table: keys and values of each rank."""

    name: str
    parts: tuple[tuple[Path, Path], ...]

    @property
    def num_keys(self) -> int:
        """Ids that have a row."""
        return sum(keys.stat().st_size // _KEY_BYTES for keys, _ in self.parts)


@dataclass(frozen=True, slots=True)
class DumpedTable:
    """A dump written out as rows 0, 1, ... by id; see `Table`."""

    dump: Dump
    shape: tuple[int, int]

    @property
    def label(self) -> str:
        """File and name, for messages."""
        return f"{self.dump.parts[0][1]}: table {self.dump.name!r}"

    def fill(self, target: Tensor, advance: Advance = unwatched) -> None:
        """Writes all rows; see `Table`."""
        rows, width = self.shape
        target.zero_()
        seen = np.zeros(rows, dtype=bool)
        for key_path, value_path in self.dump.parts:
            if not key_path.stat().st_size:
                continue  # Nothing can be mapped.
            keys = np.memmap(key_path, dtype="<i8", mode="r")
            if value_path.stat().st_size != _VALUE_BYTES * width * len(keys):
                raise CheckpointError(
                    f"{value_path}: must hold {len(keys)} rows of {width} numbers, as many as "
                    "there are keys"
                )
            values = np.memmap(value_path, dtype="<f4", mode="r", shape=(len(keys), width))
            for first in range(0, len(keys), _PIECE_ROWS):
                piece = slice(first, first + _PIECE_ROWS)
                ids = np.array(keys[piece], dtype=np.int64)
                _check_ids(ids, seen, key_path)
                copied = torch.from_numpy(np.array(values[piece], dtype=np.float32))
                if not bool(torch.isfinite(copied).all()):
                    raise CheckpointError(f"{value_path}: holds values that are not finite")
                target[torch.from_numpy(ids)] = copied
                advance(copied.numel())


def _check_ids(ids: Ids, seen: np.ndarray[tuple[int], np.dtype[np.bool_]], path: Path) -> None:
    """Refuses ids that no row has and ids that came before."""
    outside = ids[(ids < 0) | (ids >= len(seen))]
    if len(outside):
        raise CheckpointError(f"{path}: id {outside[0]} is outside the {len(seen)} rows")
    if len(np.unique(ids)) < len(ids) or seen[ids].any():
        raise CheckpointError(f"{path}: an id has two rows")
    seen[ids] = True


def find_dumps(directory: Path) -> dict[str, Dump]:
    """All dumped tables by name; none where the directory is absent.

    Raises:
        CheckpointError: a file is of no known kind, or a table's files are not complete.
    """
    found: dict[str, dict[tuple[str, int, int], Path]] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_dir() or _OF_TRAINING.fullmatch(path.name):
            continue
        match = _PART.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: is no file of a dynamicemb dump (version 2)")
        parts = found.setdefault(match[1], {})
        part = (match[2], int(match[3]), int(match[4]))
        if part in parts:
            raise CheckpointError(f"{path}: {parts[part]} is the same table")
        parts[part] = path
    return {name: _dump(name, directory, parts) for name, parts in found.items()}


def _dump(name: str, directory: Path, parts: dict[tuple[str, int, int], Path]) -> Dump:
    sizes = {size for _, _, size in parts}
    size = max(sizes)
    wanted = [[(kind, rank, size) for kind in ("keys", "values")] for rank in range(size)]
    if len(sizes) > 1 or {part for rank in wanted for part in rank} != parts.keys():
        raise CheckpointError(
            f"{directory}: the files of table {name!r} are not one of keys and one of values from "
            f"each of {size} ranks"
        )
    for keys, _ in wanted:
        if parts[keys].stat().st_size % _KEY_BYTES:
            raise CheckpointError(f"{parts[keys]}: is cut short")
    return Dump(name, tuple((parts[keys], parts[values]) for keys, values in wanted))

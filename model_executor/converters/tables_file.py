"""Writes `tables.safetensors` without holding a table in memory: the file is mapped and filled.

Format: https://github.com/huggingface/safetensors (an 8-byte header length, a JSON header padded
with spaces, then the tensors' bytes).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from model_executor.converters.tables import Advance, Table, unwatched

Watch = Callable[[str, int], Advance]
"""Told the name of each table and how many numbers it has, before they are written."""

_ALIGNMENT = 8
"""Of the data, as the library writes it."""
_FLOAT_BYTES = 4


def unwatched_table(_name: str, _numbers: int) -> Advance:
    """A `Watch` for which nobody waits."""
    return unwatched


def write_tables(path: Path, tables: Mapping[str, Table], watch: Watch = unwatched_table) -> None:
    """Writes float32 tables under the given names.

    Raises:
        CheckpointError: a table cannot be read, or holds a value that is not finite.
        OSError: there is no room for the file.
    """
    header: dict[str, object] = {}
    end = 0
    begins: dict[str, int] = {}
    for name, table in tables.items():
        begins[name] = end
        end += _FLOAT_BYTES * table.shape[0] * table.shape[1]
        header[name] = {
            "dtype": "F32",
            "shape": list(table.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            # A full disk must show here: in a mapped file it would kill the process.
            os.posix_fallocate(file.fileno(), 0, start + end)
        else:
            file.truncate(start + end)
    for name, table in tables.items():
        mapped = np.memmap(
            path, dtype="<f4", mode="r+", offset=start + begins[name], shape=table.shape
        )
        table.fill(torch.from_numpy(mapped), watch(name, mapped.size))
        mapped.flush()

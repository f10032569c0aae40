"""A model directory on disk: configuration, dense weights, and tables for the host tier.

config.json           the model (see model_config.py)
model.safetensors     dense weights, loaded to the device as a whole
tables.safetensors    embedding tables, memory-mapped and never loaded as a whole
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_executor.exceptions import ModelDirectoryError
from model_executor.model_config import ModelConfig, RowTable, read_model_config
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel

CONFIG_FILE = "config.json"
DENSE_FILE = "model.safetensors"
TABLES_FILE = "tables.safetensors"

_HEADER_LENGTH_BYTES = 8


def load_config(directory: Path) -> ModelConfig:
    """Reads the directory's `config.json`.

    Raises:
        ModelDirectoryError: the directory or the file is absent, or a value is wrong.
    """
    if not directory.is_dir():
        raise ModelDirectoryError(f"{directory}: is not a directory")
    return read_model_config(directory / CONFIG_FILE)


def load_dense_weights(directory: Path, config: ModelConfig, device: torch.device) -> SequenceModel:
    """Builds the model and fills it from `model.safetensors`.

    Raises:
        ModelDirectoryError: the file is damaged, a tensor is missing, unexpected, or has a wrong
            shape, dtype or a value that is not finite; the message names file and tensor.
    """
    path = directory / DENSE_FILE
    with torch.device("meta"):
        # Nothing is allocated before the file has been held against the config.
        model = build_model(config)
    wanted = model.state_dict()
    found = _read_tensors(path)
    for name in sorted(wanted.keys() - found.keys()):
        raise ModelDirectoryError(f"{path}: tensor {name!r} is missing")
    for name in sorted(found.keys() - wanted.keys()):
        raise ModelDirectoryError(f"{path}: tensor {name!r} does not belong to this model")
    for name, tensor in found.items():
        _check_tensor(path, name, tensor, wanted[name])
    model.load_state_dict(found, assign=True)
    return model.to(device).requires_grad_(False).eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelDirectoryError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """The tensor that a damaged file lacks the end of, where its header still says so."""
    try:
        header, data_start = _parse_header(path)
        size = path.stat().st_size
        ends = {
            name: data_start + one["data_offsets"][1]
            for name, one in header.items()
            if name != "__metadata__"
        }
        name = min((name for name in ends if ends[name] > size), key=lambda name: ends[name])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"cannot be read: {error}"
    return f"tensor {name!r} is cut short: it ends at byte {ends[name]}, the file has {size}"


def _check_tensor(path: Path, name: str, found: Tensor, wanted: Tensor) -> None:
    if found.dtype != wanted.dtype:
        raise ModelDirectoryError(
            f"{path}: tensor {name!r} is {found.dtype}, the config asks for {wanted.dtype}"
        )
    if found.shape != wanted.shape:
        raise ModelDirectoryError(
            f"{path}: tensor {name!r} has shape {list(found.shape)}, "
            f"the config asks for {list(wanted.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ModelDirectoryError(f"{path}: tensor {name!r} holds values that are not finite")


def map_tables(directory: Path, config: ModelConfig) -> list[npt.NDArray[np.float32]]:
    """Memory-maps the pooled tables, float32 [num_rows, row_dim] each, in the config's order.

    safetensors reads slices, not scattered rows, so the file's own layout (an 8-byte header
    length, a JSON header, then the tensors' bytes) is used to map single tensors.

    Raises:
        ModelDirectoryError: the file is damaged, or a table is missing, unexpected or has a wrong
            shape.
    """
    path = directory / TABLES_FILE
    header, data_start = _read_header(path)
    known = {table.name for table in config.row_tables}
    for name in sorted(header.keys() - known - {"__metadata__"}):
        raise ModelDirectoryError(f"{path}: tensor {name!r} does not belong to this model")
    return [_map_table(path, header, data_start, table, config) for table in config.row_tables]


def _map_table(
    path: Path, header: dict[str, Any], data_start: int, table: RowTable, config: ModelConfig
) -> npt.NDArray[np.float32]:
    entry = header.get(table.name)
    if not isinstance(entry, dict):
        raise ModelDirectoryError(f"{path}: tensor {table.name!r} is missing")
    wanted = [table.num_rows, config.row_dim]
    if entry.get("dtype") != "F32" or entry.get("shape") != wanted:
        raise ModelDirectoryError(
            f"{path}: tensor {table.name!r} is {entry.get('dtype')} {entry.get('shape')}, "
            f"the config asks for F32 {wanted}"
        )
    begin, end = entry["data_offsets"]
    if end - begin != 4 * wanted[0] * wanted[1] or data_start + end > path.stat().st_size:
        raise ModelDirectoryError(f"{path}: tensor {table.name!r} is cut short")
    return np.memmap(
        path, dtype="<f4", mode="r", offset=data_start + begin, shape=(wanted[0], wanted[1])
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """JSON header of a safetensors file, and where its data begins."""
    try:
        # The library's own reader checks the header, its offsets and the file's length.
        with safe_open(path, framework="np"):
            pass
        return _parse_header(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelDirectoryError(f"{path}: {_why_unreadable(path, error)}") from error


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header is said to have {length} bytes")
        header = json.loads(file.read(length))
    return header, _HEADER_LENGTH_BYTES + length


def model_version(directory: Path) -> str:
    """Digest of everything that decides a score: config, dense weights and tables.

    It is the root of every KV hash, so a changed model never meets KV of the old one. Reads all
    files once.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, DENSE_FILE, TABLES_FILE):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def tables_version(directory: Path) -> str:
    """Digest of the file of tables: the name of their rows in a parameter server. Reads it once.

    Raises:
        ModelDirectoryError: the file cannot be read.
    """
    path = directory / TABLES_FILE
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelDirectoryError(f"{path}: cannot be read: {error}") from error


def save_model(directory: Path, model: SequenceModel, tables: Mapping[str, Tensor]) -> None:
    """Writes a model directory.

    Args:
        directory: made if absent; files of the same names are replaced.
        model: dense weights.
        tables: float32 [num_rows, row_dim] by name, those of the config's `row_tables`.

    Raises:
        ValueError: a table is missing, unexpected, or has a wrong shape or dtype.
    """
    wanted = {
        table.name: (table.num_rows, model.config.row_dim) for table in model.config.row_tables
    }
    found = {name: tuple(table.shape) for name, table in tables.items()}
    if found != wanted or any(table.dtype != torch.float32 for table in tables.values()):
        raise ValueError(f"tables: must be float32 of shapes {wanted}, not {found}")
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / CONFIG_FILE
    config.write_text(json.dumps(model.config.model_dump(), indent=2) + "\n", encoding="utf-8")
    dense = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    pooled = {name: table.detach().contiguous() for name, table in tables.items()}
    for name, tensors in ((DENSE_FILE, dense), (TABLES_FILE, pooled)):
        save_file(tensors, directory / name)
        # The library writes for the owner alone, whatever the umask says.
        shutil.copymode(config, directory / name)

"""Turns a checkpoint into a model directory: all or nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from model_executor.checkpoint import (
    CONFIG_FILE,
    DENSE_FILE,
    TABLES_FILE,
    load_config,
    load_dense_weights,
    map_tables,
)
from model_executor.converters.conversion import Conversion
from model_executor.converters.errors import CheckpointError
from model_executor.converters.nvidia import read_nvidia
from model_executor.converters.options import Options, read_options
from model_executor.converters.research import read_research
from model_executor.converters.stu import read_stu
from model_executor.converters.tables_file import Watch, unwatched_table, write_tables

_READERS: dict[str, Callable[[Path, Options], Conversion]] = {
    "research": read_research,
    "stu": read_stu,
    "nvidia": read_nvidia,
}
CONVERTIBLE_DIALECTS = tuple(_READERS)


def convert_checkpoint(
    dialect: str,
    source: Path,
    target: Path,
    config_file: Path | None = None,
    watch: Watch = unwatched_table,
) -> Conversion:
    """Writes the model directory of a checkpoint; nothing of it is there unless all went well.

    Args:
        dialect: one of `CONVERTIBLE_DIALECTS`.
        source: the checkpoint, a file or a directory.
        target: the model directory to make; absent, or empty.
        config_file: JSON fields of `config.json` that the checkpoint does not say.
        watch: told how the pooled tables are getting on.

    Returns:
        What was converted.

    Raises:
        CheckpointError: the checkpoint cannot be converted, or the target is not empty.
        ModelDirectoryError: a given field is unknown or has a bad value.
        OSError: a file cannot be read or written.
    """
    target = target.absolute()
    _check_target(target)
    if not source.exists():
        raise CheckpointError(f"{source}: is not there")
    conversion = _READERS[dialect](source, read_options(config_file))
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as directory:
        built = Path(directory) / target.name
        built.mkdir()
        _write(built, conversion, watch)
        # As the engine would load it.
        config = load_config(built)
        load_dense_weights(built, config, torch.device("cpu"))
        map_tables(built, config)
        built.rename(target)
    return conversion


def describe(conversion: Conversion) -> str:
    """A few lines on what was converted and what was not."""
    config = conversion.config
    number = len(conversion.weights) + len(conversion.tables)
    head = (
        f"{config.dialect} model of {config.num_layers} layers over {config.num_items} items, "
        f"n = {config.normaliser}: {number} tensors, {len(conversion.tables)} of them pooled tables"
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in conversion.dropped.items():
        reasons.setdefault(reason, []).append(name)
    left_out = [f"left out, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join([head, *left_out, *conversion.notes])


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target}: is no directory")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target}: is not empty")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: there is no directory {target.parent} to write it to")


def _write(directory: Path, conversion: Conversion, watch: Watch) -> None:
    """The three files of a model directory, as `checkpoint.save_model` writes them.

    That one holds all tables in memory, where a checkpoint's may not fit.
    """
    text = json.dumps(conversion.config.model_dump(), indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    save_file(dict(conversion.weights), directory / DENSE_FILE)
    # The library makes its files for their owner alone.
    (directory / DENSE_FILE).chmod((directory / CONFIG_FILE).stat().st_mode)
    write_tables(directory / TABLES_FILE, conversion.tables, watch)

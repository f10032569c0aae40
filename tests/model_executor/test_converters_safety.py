"""Nothing in a checkpoint ever runs: pickles with code in them, in every place that has pickles."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from model_executor.converters.convert import convert_checkpoint
from model_executor.converters.distributed_checkpoint import read_tables
from model_executor.converters.errors import CheckpointError
from model_executor.converters.restricted_pickle import read_metadata
from model_executor.converters.torch_checkpoint import load_torch_file
from tests.model_executor.golden_checkpoints import (
    fused_state,
    nvidia_tables,
    research_state,
    stu_parts,
    write_config,
    write_nvidia,
    write_research,
    write_stu,
)


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def evils(made: Path) -> dict[str, Evil]:
    """Pickles that would make a file, each by another way."""
    return {
        "system": Evil(os.system, f"touch {made}"),
        "exec": Evil(exec, f"import pathlib; pathlib.Path({str(made)!r}).touch()"),
        "method": Evil(Path.touch, made),
        "open": Evil(open, str(made), "w"),
        "nested": Evil(list, [Evil(os.mkdir, str(made))]),
    }


KINDS = list(evils(Path()))


def research(directory: Path, evil: Evil) -> tuple[str, str, Path]:
    state = {**research_state(), "_attn_mask": evil}
    return "research", "research_encoder", write_research(directory, state)


def research_legacy(directory: Path, evil: Evil) -> tuple[str, str, Path]:
    path = directory / "plain.pth"
    path.write_bytes(pickle.dumps(evil, protocol=2))
    return "research", "research_encoder", path


def stu_dense(directory: Path, evil: Evil) -> tuple[str, str, Path]:
    dense, tables = stu_parts("dlrm_streaming_rows")
    return "stu", "dlrm_streaming_rows", write_stu(directory, {**dense, "more": evil}, tables)


def stu_metadata(directory: Path, evil: Evil) -> tuple[str, str, Path]:
    source = write_stu(directory, *stu_parts("dlrm_streaming_rows"))
    (source / "sparse" / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=evil)))
    return "stu", "dlrm_streaming_rows", source


def stu_shard(directory: Path, evil: Evil) -> tuple[str, str, Path]:
    source = write_stu(directory, *stu_parts("dlrm_streaming_rows"))
    (file,) = (source / "sparse").glob("*.distcp")
    # Every shard begins with the pickle, and is long enough to hold it.
    evil_bytes = pickle.dumps(evil, protocol=2)
    shards = read_tables(source / "sparse").values()
    content = bytearray(file.read_bytes())
    for shard in [shard for one in shards for shard in one.shards]:
        content[shard.offset : shard.offset + len(evil_bytes)] = evil_bytes
    file.write_bytes(content)
    return "stu", "dlrm_streaming_rows", source


def nvidia(directory: Path, evil: Evil) -> tuple[str, str, Path]:
    state = {**fused_state(), "_mlp._mlp.0._extra_state": evil}
    return "nvidia", "nvidia_ranking", write_nvidia(directory, state, nvidia_tables())


WRITERS = [research, research_legacy, stu_dense, stu_metadata, stu_shard, nvidia]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITERS)
def test_code_in_a_pickle_never_runs(
    tmp_path: Path, write: Callable[[Path, Evil], tuple[str, str, Path]], kind: str
) -> None:
    made = tmp_path / "made-by-the-pickle"
    dialect, case, source = write(tmp_path, evils(made)[kind])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_checkpoint(dialect, source, tmp_path / "model", write_config(tmp_path, case))
    assert not made.exists()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_these_pickles_would_run(tmp_path: Path, kind: str) -> None:
    made = tmp_path / "made"
    function, args = evils(made)[kind].call
    if kind == "nested":
        inner = args[0]
        assert isinstance(inner, list)
        function, args = inner[0].call
    result = function(*args)
    if hasattr(result, "close"):
        result.close()
    assert made.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "Size.__class__"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "field"),
        ("collections", "OrderedDict.__init__"),
        ("functools", "partial"),
    ],
)
def test_metadata_admits_no_other_name(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / ".metadata"
    # Protocol 4: two strings, STACK_GLOBAL, STOP.
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    path.write_bytes(b"\x80\x04" + strings + b"\x93.")
    with pytest.raises(CheckpointError, match=rf"it names {module}\.{name}, which"):
        read_metadata(path)


def test_names_of_sharded_tensors_do_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"looked_up": Evil(getattr, [], "append")}, path)
    looked_up = load_torch_file(path)["looked_up"]
    assert isinstance(looked_up, type)
    assert looked_up.__module__ == "model_executor.converters.torch_checkpoint"

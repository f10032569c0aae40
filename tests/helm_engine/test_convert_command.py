"""`helm-engine convert`: what it prints and with which status it ends."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from helm_engine.entrypoints.cli import app
from model_executor.checkpoint import TABLES_FILE
from model_executor.converters.convert import CONVERTIBLE_DIALECTS, convert_checkpoint
from model_executor.model_config import NvidiaConfig, ResearchConfig, SequenceModelConfig, StuConfig
from tests.model_executor.golden_checkpoints import (
    nvidia_tables,
    stu_parts,
    weights,
    write_config,
    write_nvidia,
    write_research,
    write_stu,
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_each_dialect_has_its_report(tmp_path: Path) -> None:
    streaming, ranking = "dlrm_streaming_rows", "nvidia_ranking"
    sources = {
        "research": ("research_encoder", write_research(tmp_path)),
        "stu": (streaming, write_stu(tmp_path, *stu_parts(streaming))),
        "nvidia": (ranking, write_nvidia(tmp_path, weights(ranking), nvidia_tables())),
    }
    assert sources.keys() == set(CONVERTIBLE_DIALECTS)
    reports = {}
    for dialect, (case, source) in sources.items():
        target = tmp_path / f"model-{dialect}"
        config = write_config(tmp_path, case)
        done = run("--dialect", dialect, source, target, "--config", config)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{target}: {dialect} model of ")
        reports[dialect] = done.stdout
    assert (
        reports["research"]
        .splitlines()[0]
        .endswith("2 layers over 300 items, n = 51: 12 tensors, 1 of them pooled tables")
    )
    assert "left out, the causal mask, a constant: _attn_mask" in reports["research"]
    assert "left out, no weights of the model: class_metrics, global_step," in reports["stu"]


def test_every_number_of_the_tables_is_told_as_it_is_written(tmp_path: Path) -> None:
    streaming, ranking = "dlrm_streaming_rows", "nvidia_ranking"
    sources = {
        "research": ("research_encoder", write_research(tmp_path)),
        "stu": (streaming, write_stu(tmp_path, *stu_parts(streaming))),
        "nvidia": (ranking, write_nvidia(tmp_path, weights(ranking), nvidia_tables())),
    }
    for dialect, (case, source) in sources.items():
        expected: dict[str, int] = {}
        told: Counter[str] = Counter()

        def watch(
            table: str,
            numbers: int,
            expected: dict[str, int] = expected,
            told: Counter[str] = told,
        ) -> Callable[[int], None]:
            expected[table] = numbers
            return lambda written: told.update({table: written})

        target = tmp_path / f"model-{dialect}"
        convert_checkpoint(dialect, source, target, write_config(tmp_path, case), watch)
        tables = load_file(target / TABLES_FILE)
        assert expected == {name: table.numel() for name, table in tables.items()}
        assert told == expected


def test_errors_are_one_line_and_status_two(tmp_path: Path) -> None:
    source = write_research(tmp_path)
    for arguments, message in [
        ((source, tmp_path / "model"), "--config FILE: missing: num_heads, max_sequence_len, "),
        ((tmp_path / "gone", tmp_path / "model"), f"{tmp_path}/gone: is not there"),
        ((source, tmp_path), f"{tmp_path}: is not empty"),
    ]:
        done = run("--dialect", "research", *arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"helm-engine: error: {message}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_dialect_must_be_named(tmp_path: Path) -> None:
    assert run(tmp_path, tmp_path).exit_code == 2
    assert run("--dialect", "sasrec", tmp_path, tmp_path).exit_code == 2


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    source, config = write_research(tmp_path), write_config(tmp_path, "research_encoder")
    # A name that no file system takes.
    target = tmp_path / ("x" * 254)
    done = run("--dialect", "research", source, target, "--config", config)
    assert done.exit_code == 2
    assert "File name too long" in done.stderr


def test_examples_of_the_document_are_fields_of_their_configs() -> None:
    document = Path(__file__).parents[2] / "docs" / "convert.md"
    examples = re.findall(r"```json\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    configs: list[type[SequenceModelConfig]] = [ResearchConfig, StuConfig, NvidiaConfig]
    for example, config in zip(examples, configs, strict=True):
        assert json.loads(example).keys() <= config.model_fields.keys()

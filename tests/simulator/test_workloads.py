"""Workloads as JSON: what is read is what was written, and what is wrong is named by its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helm_engine.simulator.workloads import (
    BUILTIN,
    ML100K_ITEMS,
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


NO_CATEGORIES = {"num_categories": None, "categories_per_user": None}


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
        (setting(num_categories=None), "num_categories: is absent, and the data dlrmv3 need it"),
        (setting(data="production"), "num_categories: means nothing to the data production"),
        (setting(**NO_CATEGORIES, data="ml100k"), "num_items: 6000 is not 2,829,124"),
        (
            setting(**NO_CATEGORIES, data="production"),
            r"regimes\[0\].item_zipf: means nothing to the data production",
        ),
        (regimes(item_zipf=None), r"regimes\[1\].item_zipf: is absent"),
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
    with pytest.raises(ValueError, match=r"burst, .*steady, .*trend|No such file"):
        load_workload(name)


def test_the_data_of_movielens_do_not_drift(tmp_path: Path) -> None:
    (one,) = as_json(workload())["regimes"]
    changes = setting(**NO_CATEGORIES, data="ml100k", num_items=ML100K_ITEMS)
    changes["regimes"] = [one | {"item_zipf": None, "drift_per_s": 1.0}]
    with pytest.raises(ValueError, match=r"regimes\[0\].drift_per_s: the data ml100k do not drift"):
        load_workload(written(tmp_path, **changes))


def test_what_the_package_brings_can_be_read() -> None:
    assert builtin_names("settings") == ["dlrmv3", "ml100k", "production"]
    for name in ("burst", "steady", "trend"):
        for data in builtin_names("settings"):
            read = load_workload(name, data)
            assert read.name == (name if data == "dlrmv3" else f"{name}-{data}")
            assert read.resolved_setting == load_setting(data)
            assert "static split" in read.description
    assert len(builtin_names("workloads")) == 9
    for name in builtin_names("settings"):
        assert load_setting(name).profile in builtin_names("profiles")
    for name in builtin_names("profiles"):
        assert load_cost_profile(BUILTIN / "profiles" / f"{name}.json").source


def test_a_workload_over_another_setting(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(as_json(load_setting("dlrmv3")) | {"slo_ms": 1.0}))
    read = load_workload("burst", str(other))
    assert read.resolved_setting.slo_ms == 1.0
    assert read.regimes == load_workload("burst").regimes
    assert load_workload("burst", "dlrmv3") == load_workload(
        "burst", str(BUILTIN / "settings" / "dlrmv3.json")
    )


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("burst", "nowhere", "setting: 'nowhere' is none of dlrmv3, ml100k, production"),
        ("burst-production", "dlrmv3", r"burst-production: regimes\[0\]\.(item_zipf|history_mean)"),
    ],
)
def test_a_setting_that_is_not_there_or_does_not_fit(name: str, data: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_workload(name, data)

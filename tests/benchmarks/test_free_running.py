"""The comparison of engine and simulator: its bounds, and a short run of both."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import burst_requests, free_running
from benchmarks.free_running import compare
from benchmarks.real_tables import free_running as table
from helm_engine.simulator.simulation import EngineModel, Result, simulate
from helm_engine.simulator.trace import make_trace
from tests.simulator.small import PROFILE, workload


@pytest.fixture(scope="module")
def result() -> Result:
    trace = make_trace(workload(), 2)
    return simulate(trace, EngineModel(trace.setting, PROFILE), 0.3)


def slower(result: Result, factor: float) -> Result:
    return replace(result, latencies_ms=result.latencies_ms * factor)


def test_a_simulation_is_within_the_bounds_of_itself(result: Result) -> None:
    found = compare([result] * 3, result)
    assert found["p50_ratio"] == found["p99_ratio"] == 1.0
    assert found["hit_points"] == {"kv_hit_rate": 0.0, "emb_hit_rate": 0.0}
    assert found["within_bounds"] == {"hits": True, "p50": True, "p99": True}
    assert found["service"]["load"] == found["service"]["compute"] == pytest.approx(1.0)


def test_a_spread_of_the_real_repeats_widens_the_bound_of_p99_alone(result: Result) -> None:
    for factors, within in (((1.2, 1.2, 1.2), False), ((0.98, 1.2, 1.2), True)):
        found = compare([slower(result, one) for one in factors], result)
        assert found["within_bounds"] == {"hits": True, "p50": False, "p99": within}
        assert found["p99_ratio"] == pytest.approx(1.0 / 1.2)


def test_a_point_of_hits_is_the_limit(result: Result) -> None:
    fewer = replace(result, cached_tokens=(result.cached_tokens * 0.95).astype(np.int64))
    found = compare([fewer] * 3, result)
    assert found["hit_points"]["kv_hit_rate"] > 1.0
    assert not found["within_bounds"]["hits"]


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that it says nothing of times; hits are as near as the same requests make them."""
    monkeypatch.setenv("HELM_CACHE", str(tmp_path))
    monkeypatch.setattr(burst_requests, "NUM_ITEMS", 8192)
    monkeypatch.setattr(burst_requests, "POOL_BYTES", 16 << 20)
    for name, value in (("REPEATS", 2), ("QUICK_BATCHES", 20)):
        monkeypatch.setattr(free_running, name, value)
    monkeypatch.setattr(free_running, "QUICK_REGIME_S", 2.0)
    monkeypatch.setattr(free_running, "QUICK_WARM_UP_S", 0.5)
    file = tmp_path / "free.json"
    monkeypatch.setattr(sys, "argv", ["free_running.py", "--quick", "--json", str(file)])
    free_running.main()
    found: dict[str, Any] = json.loads(file.read_text())
    (cell,) = found["cells"]
    assert (cell["cell"], len(cell["real"])) == ("moving", 2)
    assert max(map(abs, cell["hit_points"].values())) < 10.0
    for one in (*cell["real"], cell["simulated"]):
        assert one["failed"] == 0
        assert 0.0 < one["emb_fraction"] < 1.0
    head, rule, *rest = table(found)
    assert [line.count("|") for line in rest] == [head.count("|")] == [rule.count("|")]

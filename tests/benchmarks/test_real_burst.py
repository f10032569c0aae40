"""The burst against a real server: what is recorded, how runs are compared, and a short one."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import burst_requests, real_burst
from benchmarks.burst_requests import Recording, record, workload
from benchmarks.cpu_use import MOST_BUSY, CpuUse
from benchmarks.real_burst_figures import (
    Boundary,
    Run,
    best_static,
    boundary_of,
    max_score_diff,
    ratio,
)
from benchmarks.real_tables import real_burst as table
from benchmarks.real_tables import real_burst_cpu, real_burst_runs
from benchmarks.recorded_client import Outcome


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(workload(3.0, 1.0), 5)


def test_a_seed_is_recorded_once_for_all(recording: Recording) -> None:
    assert record(workload(3.0, 1.0), 5).digest == recording.digest
    assert record(workload(3.0, 1.0), 6).digest != recording.digest
    trace = recording.trace
    for number in (0, len(trace) // 2, len(trace) - 1):
        body = json.loads(recording.bodies[number])
        tokens = trace.tokens(number)
        assert body["user"] == f"user-{trace.people[number]}"
        assert body["history"]["item_ids"] == tokens.rows.tolist()
        assert body["candidates"]["item_ids"] == tokens.candidate_rows.tolist()
        assert max(body["candidates"]["item_ids"]) < burst_requests.NUM_ITEMS


def test_regimes_take_turns() -> None:
    law = workload(3.0, 1.0, regimes=5)
    assert [one.hot_user_share > 0.5 for one in law.regimes] == [False, True, False, True, False]
    assert law.ends[-1] == 16.0
    assert len({one.name for one in law.regimes}) == 5


def run_of(recording: Recording, arm: str, latency_ms: float, machine: float = 0.5) -> Run:
    """Every request took so long."""
    number = len(recording.trace)
    outcome = Outcome(
        began=0.0,
        latencies_ms=[latency_ms] * number,
        late_ms=[0.1] * number,
        statuses=["200"] * number,
        usage=[{}] * number,
        scores=[np.full(3, 0.5, dtype=np.float32)] * number,
        cpu_shares={"machine": machine},
    )
    return Run(arm, recording, outcome, Boundary([0.0], [0.5], [0.5]), 0)


def test_a_controller_is_compared_with_the_best_split_of_all_repeats(recording: Recording) -> None:
    costs = {"static:0.3": (100.0, 300.0), "static:0.6": (200.0, 220.0), "helm": (110.0, 110.0)}
    repeats = [
        {arm: run_of(recording, arm, both[place]) for arm, both in costs.items()}
        for place in range(2)
    ]
    statics = ["static:0.3", "static:0.6"]
    assert best_static(repeats, statics) == "static:0.6"
    found = ratio(repeats, "helm", statics)
    assert found is not None
    assert found["ratio"] == pytest.approx(110.0 / 220.0)
    # A draw has the first repeat alone, the second alone, or both.
    assert found["interval"] == pytest.approx([110.0 / 220.0, 110.0 / 100.0])
    assert ratio([], "helm", statics) is None


def test_a_request_that_failed_breaks_the_slo_and_is_slower_than_all(recording: Recording) -> None:
    run = run_of(recording, "helm", burst_requests.SLO_MS - 1.0)
    assert run.slo_share == 1.0
    last = len(recording.trace) - 1
    run.outcome.latencies_ms[last] = float("nan")
    run.outcome.statuses[last] = "503"
    run.outcome.scores[last] = None
    failing = replace(run)
    assert failing.failed == 1
    counted = int(failing.counted.sum())
    assert np.isnan(failing.latencies_ms).sum() == 1
    assert ratio(
        [{"helm": failing, "static:0.5": run_of(recording, "s", 1.0)}], "helm", ["static:0.5"]
    )
    assert failing.slo_share == pytest.approx(1.0 - 1.0 / counted)
    assert max_score_diff([{"a": run_of(recording, "a", 1.0), "b": failing}]) == 0.0


def test_scores_of_other_splits_are_compared_one_by_one(recording: Recording) -> None:
    first, other = (run_of(recording, name, 1.0) for name in "ab")
    other.outcome.scores[1] = np.array([0.5, 0.5, 0.75], dtype=np.float32)
    assert max_score_diff([{"a": first, "b": other}]) == pytest.approx(0.25)
    other.outcome.scores[2] = np.array([0.5, np.nan, 0.5], dtype=np.float32)
    assert np.isnan(max_score_diff([{"a": first, "b": other}]))


def test_a_run_on_a_busy_machine_is_void(recording: Recording) -> None:
    assert run_of(recording, "a", 1.0, machine=MOST_BUSY + 0.01).is_void
    assert not run_of(recording, "a", 1.0, machine=MOST_BUSY).is_void


def test_the_split_over_time_is_that_of_the_decision_log() -> None:
    lines = [{"at": at, "committed": 0.1 * at, "target": 0.2 * at} for at in (1.0, 3.0, 4.0)]
    found = boundary_of(lines, began=2.0, emb_fraction=0.5)
    assert found.seconds == [0.0, 1.0, 2.0]
    assert found.committed == pytest.approx([0.5, 0.3, 0.4])
    assert found.target == pytest.approx([0.5, 0.6, 0.8])


def test_processors_are_those_of_the_machine() -> None:
    use = CpuUse({"mine": [os.getpid()], "nobody": []})
    sum(number * number for number in range(2_000_000))
    shares = use.shares()
    assert shares["nobody"] == 0.0
    assert shares["mine"] > 0.0
    assert shares["ours"] == pytest.approx(shares["mine"] / (os.cpu_count() or 1))


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis, link, profile, servers and client; so small that it says nothing but that it works."""
    monkeypatch.setenv("HELM_CACHE", str(tmp_path))
    monkeypatch.setattr(burst_requests, "NUM_ITEMS", 8192)
    monkeypatch.setattr(burst_requests, "POOL_BYTES", 16 << 20)
    monkeypatch.setattr(real_burst, "QUICK_WARM_UP_S", 0.5)
    monkeypatch.setattr(real_burst, "QUICK_BATCHES", 20)
    monkeypatch.setattr(real_burst, "CONTROL_PERIOD_S", 0.25)
    result, picture = tmp_path / "burst.json", tmp_path / "burst.png"
    flags = ["--quick", "--json", str(result), "--plot", str(picture), "--statics", "0.3"]
    more = ["--controllers", "marginal", "--regime-seconds", "2"]
    monkeypatch.setattr(sys, "argv", ["real_burst.py", *flags, *more])
    real_burst.main()
    found: dict[str, Any] = json.loads(result.read_text())
    assert {"command", "machine", "versions", "seeds"} <= found.keys()
    assert found["failed_requests"] == 0
    assert found["max_score_diff"] <= real_burst.TOLERANCE
    assert [one["arm"] for one in found["cells"]] == ["static:0.3", "marginal"]
    assert (found["runs"], len(found["requests_sha256"])) == (2, 1)
    static, controlled = found["each_run"]
    assert static["boundary"]["committed"] == [0.3]
    assert len(controlled["boundary"]["committed"]) > 10
    for one in found["cells"]:
        assert one["cpu_shares"]["core"] > 0.0
        assert 0.0 < one["kv_hit_share"] < 1.0
        assert 0.0 < one["row_hit_share"] < 1.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for lines in (table, real_burst_cpu, real_burst_runs):
        head, rule, *rest = lines(found)
        assert rest
        assert {line.count("|") for line in (head, rule, *rest)} == {head.count("|")}

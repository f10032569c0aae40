"""A real server records what a real client asks; the simulator meets the same hits."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from helm_engine.entrypoints.cli import app
from helm_engine.request_trace.file_format import read_trace_file
from helm_engine.simulator.recording import read_recording
from helm_engine.simulator.simulation import Result, simulate
from tests.e2e.running_server import BUNDLED_MODEL, REPOSITORY, running_server

USERS = ("somebody-with-a-name", "another@example.org", *(f"user number {n}" for n in range(4)))
PROFILE = REPOSITORY / "helm_engine/simulator/builtin/profiles/cpu-slow-redis.json"


@dataclass
class Recorded:
    """What a server was asked, answered and wrote."""

    path: Path
    usages: list[dict[str, Any]]
    metrics: dict[str, float]
    statuses: list[int]


def bodies() -> Iterator[dict[str, Any]]:
    """Visits of users whose histories grow, some edited, some cut; passers-by; and an error."""
    rng = np.random.default_rng(3)
    histories = {user: rng.integers(1, 1683, 40).tolist() for user in USERS}
    for visit in range(60):
        user = USERS[int(rng.integers(len(USERS)))]
        history = histories[user]
        if visit % 9 == 4:
            history[len(history) // 2] = int(rng.integers(1, 1683))
        body: dict[str, Any] = {
            "user": user,
            "history": {"item_ids": history[:], "timestamps": list(range(len(history)))},
            "candidates": {"item_ids": rng.integers(1, 1683, 30).tolist()},
        }
        if visit % 7 == 3:
            del body["user"]
        if visit % 11 == 5:
            del body["candidates"]
        if visit % 13 == 6:
            body["history"] = {name: column[:25] for name, column in body["history"].items()}
        yield body
        history += rng.integers(1, 1683, 5).tolist()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    path = tmp_path_factory.mktemp("recorded") / "served.trace"
    pool = ["--pool-bytes", "560KiB", "--emb-fraction", "0.3", "--max-num-batched-tokens", "64"]
    flags = [*pool, "--refill-bytes-per-second", "0", "--cost-profile", str(PROFILE)]
    with running_server(BUNDLED_MODEL, *flags, "--record-trace", str(path)) as server:
        answers = [server.post(body) for body in bodies()]
        late = {**next(bodies()), "deadline_ms": 0.001}
        statuses = [one.status_code for one in [*answers, server.post(late)]]
        lines = server.get("/metrics").text
        assert server.stop() == 0
    metrics = {
        sample.name: sample.value
        for family in text_string_to_metric_families(lines)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    return Recorded(path, [one.json()["usage"] for one in answers], metrics, statuses)


@pytest.fixture(scope="module")
def simulated(recorded: Recorded) -> Result:
    recording, remarks = read_recording(recorded.path)
    assert remarks == []
    assert recording.header.profile is not None
    model = recording.engine(recording.header.profile)
    # The one that came too late would not be late where no time passes before it is looked at.
    answered = np.arange(len(recording) - 1)
    trace = recording.trace(recording.workload(model.setting), which=answered)
    return simulate(trace, model, recording.header.emb_fraction)


def test_all_that_was_asked_is_recorded_with_what_became_of_it(recorded: Recorded) -> None:
    file = read_trace_file(recorded.path)
    assert [one.status for one in file.records] == recorded.statuses
    assert (file.end, file.lost, file.torn_at) == ("stopped", 0, None)
    assert recorded.statuses[-1] == 504
    for record, usage in zip(file.records, recorded.usages, strict=False):
        assert record.num_tokens == usage["history_tokens"]
        assert record.cached_tokens == usage["cached_tokens"]
        assert record.rows_resident == usage["rows_resident"]
        assert record.latency_ms >= sum(usage["timings_ms"].values())
    assert recorded.metrics["helm:trace_requests_lost_total"] == 0


def test_the_simulator_meets_the_same_hits_as_the_server(
    recorded: Recorded, simulated: Result
) -> None:
    for mine, name in (
        (simulated.cached_tokens, "cached_tokens"),
        (simulated.rows_requested, "rows_requested"),
        (simulated.rows_resident, "rows_resident"),
    ):
        assert mine.tolist() == [usage[name] for usage in recorded.usages]
    steps, metrics = simulated.steps, recorded.metrics
    assert metrics["helm:prefix_cache_hits_total"] == simulated.cached_tokens.sum()
    assert metrics["helm:emb_cache_queries_total"] == steps["rows"].sum()
    hits = steps["rows"].sum() - steps["missing_rows"].sum()
    assert metrics["helm:emb_cache_hits_total"] == hits
    # Both tenants have evicted, contexts came in chunks, and some were found.
    assert metrics["helm:kv_cache_evictions_total"] > 0
    assert metrics["helm:emb_cache_evictions_total"] > 0
    assert len(steps["rows"]) > len(simulated.latencies_ms)
    assert 0 < simulated.cached_tokens.sum() < simulated.trace.lengths.sum()


def test_the_command_tells_the_same_of_the_file(recorded: Recorded, simulated: Result) -> None:
    out = recorded.path.with_name("out.json")
    wanted = ["--trace", str(recorded.path), "--emb-fraction", "0.3", "--json", str(out)]
    done = CliRunner().invoke(app, ["simulate", *wanted])
    assert (done.exit_code, done.stderr) == (0, "")
    result = json.loads(out.read_text())["result"]
    assert result["requests"] == len(recorded.statuses)
    assert result["kv_hit_rate"] == pytest.approx(
        simulated.cached_tokens.sum() / simulated.trace.lengths.sum(), abs=0.01
    )


def test_no_id_is_in_the_file(recorded: Recorded) -> None:
    written = recorded.path.read_bytes()
    assert recorded.path.stat().st_mode & 0o077 == 0
    for user in USERS:
        assert user.encode() not in written
    # Three items in a row, as the server holds them and as msgpack would have them.
    items = next(bodies())["history"]["item_ids"]
    for first in range(len(items) - 2):
        three = items[first : first + 3]
        for code in ("<3q", "<3i", ">3H"):
            assert struct.pack(code, *three) not in written
    ids = {int(one) for record in read_trace_file(recorded.path).records
           for one in np.frombuffer(record.rows, "<i8")}  # fmt: skip
    assert not ids & set(range(1683))

"""`helm-engine plan`: against brute force on a small trace; what it says and what it refuses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helm_engine.entrypoints.cli import app
from helm_engine.simulator.figures import figures
from helm_engine.simulator.hindsight import p99_of
from helm_engine.simulator.oracle import WINDOW_S, WindowCosts
from helm_engine.simulator.phases import phases_of
from helm_engine.simulator.planning import Plan, PlanConfig, make_plan
from helm_engine.simulator.recording import Recording, read_recording
from helm_engine.simulator.simulation import simulate
from helm_engine.simulator.spreading import engine_of
from helm_engine.simulator.trace import make_trace
from tests.simulator.recorded import write_recording
from tests.simulator.small import PROFILE, regime, workload

LAWS: dict[str, Any] = {"seconds": 25.0, "hot_users": 40, "history_mean": 150}


def written(path: Path) -> Path:
    """Regulars whose KV fills the pool, then passers-by who need rows."""
    drawn = make_trace(
        workload(
            regime(**LAWS, hot_user_share=0.95),
            regime(**LAWS, name="passing", hot_user_share=0.0, candidates=150),
            pool_bytes=2_400_000,
            num_items=24_000,
            max_history=400,
            requests_per_s=20.0,
            slo_ms=6.0,
        ),
        3,
    )
    return write_recording(path, drawn)


@cache
def planned(directory: Path) -> tuple[Recording, Plan]:
    recording, _ = read_recording(written(directory / "served.trace"))
    config = PlanConfig((1, 2), ("static:0.3",), warm_up_s=5.0, search_scale=1, evaluations=6)
    return recording, make_plan(recording, PROFILE, config)


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Plan]:
    return planned(tmp_path_factory.getbasetemp())


def static_p99(recording: Recording, share: float) -> float:
    """Of a split that holds from the beginning; the plan's move there in the warm-up."""
    model = recording.engine(PROFILE)
    trace = recording.trace(recording.workload(model.setting, 5.0))
    return p99_of(simulate(trace, model, share))


def test_the_best_static_split_is_better_than_its_neighbours(made: tuple[Recording, Plan]) -> None:
    recording, plan = made
    best = plan.best_share
    p99 = {round(best + step, 2): static_p99(recording, best + step) for step in (-0.1, 0, 0.1)}
    assert min(p99.values()) == pytest.approx(p99[best], rel=0.03)
    by_name = {line.name: line for line in plan.lines}
    assert list(by_name) == ["as served", "best static", "best schedule", "static:0.3"]
    assert by_name["best static"].p99_ms == pytest.approx(p99[best], rel=0.03)
    assert min(p99 for p99, _ in plan.static.values()) >= by_name["best static"].p99_ms
    assert by_name["best schedule"].p99_ms <= by_name["best static"].p99_ms
    assert by_name["static:0.3"].figures.emb_fraction == pytest.approx(0.3, abs=0.01)


def test_adapting_is_bounded_by_the_oracle(made: tuple[Recording, Plan]) -> None:
    _, plan = made
    assert 0.0 < plan.oracle_ms < plan.static_ms
    assert plan.static_ms <= min(device for _, device in plan.static.values()) * 1.001
    assert plan.num_phases >= 2


def test_engines_share_the_users_and_nothing_else(made: tuple[Recording, Plan]) -> None:
    recording, plan = made
    one, two = plan.engines
    assert (one.engines, two.engines) == (1, 2)
    line = next(line for line in plan.lines if line.name == "best static")
    assert (one.p99_ms, one.slo_share) == (line.p99_ms, line.figures.slo_share)
    assert (one.kv_hit_rate, one.emb_hit_rate) == (
        line.figures.kv_hit_rate, line.figures.emb_hit_rate
    )  # fmt: skip
    # Each by itself, from its own requests.
    places = engine_of(recording.users, 2)
    model = recording.engine(PROFILE)
    told = recording.workload(model.setting, 5.0)
    parts = [
        simulate(recording.trace(told, which=np.flatnonzero(places == place)), model, 0.5)
        for place in range(2)
    ]
    counted = [figures(part).requests for part in parts]
    assert sum(counted) == line.figures.requests
    assert two.busiest_share == max(counted) / sum(counted)
    assert two.p99_ms < one.p99_ms


def test_one_engine_more_takes_users_from_all_and_moves_no_other() -> None:
    users = np.random.default_rng(1).integers(1, 1 << 62, 20_000)
    for number in (1, 2, 5):
        before, after = engine_of(users, number), engine_of(users, number + 1)
        moved = before != after
        assert (after[moved] == number).all()
        assert moved.mean() == pytest.approx(1 / (number + 1), abs=0.02)
        assert np.bincount(after, minlength=number + 1).min() > 0.9 * len(users) / (number + 1)


def test_who_names_no_user_is_spread_too() -> None:
    places = engine_of(np.zeros(3000, dtype=np.int64), 3)
    assert np.bincount(places).min() > 900


def test_phases_are_stretches_that_are_cheapest_at_other_splits() -> None:
    begins = np.arange(20, dtype=np.float64) * np.float64(WINDOW_S)
    is_second = (begins >= 40) & (begins < 80)
    cost = np.where(is_second, [[3.0], [2.0], [1.0]], [[1.0], [2.0], [3.0]])
    costs = WindowCosts(begins, np.array([0.2, 0.5, 0.8]), cost)
    arrivals = np.arange(0.0, 100.0, 0.5)
    phases = phases_of(costs, arrivals, 0.0, 100.0)
    assert [(one.seconds, one.kind) for one in phases] == [(40.0, 0), (40.0, 1), (20.0, 0)]
    alike = WindowCosts(begins, costs.shares, np.tile([[1.0], [2.0], [3.0]], 20))
    assert [one.kind for one in phases_of(alike, arrivals, 0.0, 100.0)] == [0]


# ---------------------------------------------------------------- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_the_command_prints_writes_and_draws(tmp_path: Path) -> None:
    drawn = make_trace(workload(regime(seconds=8.0)), 3)
    path = write_recording(tmp_path / "served.trace", drawn)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    files = ["--json", str(out), "--plot", str(picture)]
    done = invoke("--trace", str(path), "--engines", "2,1", "--slo-ms", "9", *files)
    assert (done.exit_code, done.stderr) == (0, "")
    for words in ("as served", "best static", "Best static split", "within 9 ms", "engines"):
        assert words in done.stdout
    found = json.loads(out.read_text())
    assert found["requests"] == len(drawn)
    assert [one["engines"] for one in found["engines"]] == [1, 2]
    assert found["setting"]["slo_ms"] == 9.0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--trace", "none.trace"], "none.trace: No such file"),
        (["--engines", "0"], "--engines: '0' must be numbers from 1 to 1024"),
        (["--engines", "two"], "--engines: 'two' must be"),
        (["--controller", "magic"], "controller: 'magic'"),
        (["--scale", "3"], "scale: must be a power of two"),
        (["--pool-bytes", "many"], "pool_bytes: 'many' is not a size"),
        (["--pool-bytes", "1000"], "pool_bytes: 1000 is too small"),
        (["--warm-up", "1000"], "warm_up: 1000 s leave none of the"),
        (["--profile", "nothing"], "profile: 'nothing'"),
        (["--json", "no/such/out.json"], "--json: no/such/out.json"),
        (["--plot", "out.txt"], "--plot: out.txt: the ending"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, changes: list[str], named: str) -> None:
    path = write_recording(tmp_path / "served.trace", make_trace(workload(), 3))
    done = invoke("--trace", str(path), *changes)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("helm-engine: error: ")
    assert named in line

"""`helm-engine simulate`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helm_engine.entrypoints.cli import app
from helm_engine.simulator.step_log import COLUMNS
from helm_engine.simulator.workloads import as_json
from tests.simulator.small import regime, setting, workload


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.json"
    laws = workload(regime(seconds=4.0), regime(name="second", seconds=4.0, load=2.0))
    path.write_text(json.dumps(as_json(laws)), encoding="utf-8")
    return str(path)


def test_a_workload_of_ones_own(mine: str, tmp_path: Path) -> None:
    out, log = tmp_path / "out.json", tmp_path / "steps.npz"
    wanted = ["--workload", mine, "--emb-fraction", "0.3", "--at", "4:0.6", "--seed", "3"]
    done = invoke(*wanted, "--json", str(out), "--step-log", str(log))
    assert done.exit_code == 0, done.stderr
    for word in ("first", "second", "all", "within 20 ms"):
        assert word in done.stdout
    written = json.loads(out.read_text())
    assert written["workload"] == json.loads(Path(mine).read_text())
    assert written["seed"] == 3
    assert written["schedule"] == [[4.0, 0.6]]
    result = written["result"]
    assert [one["name"] for one in result["regimes"]] == ["first", "second"]
    assert sum(one["requests"] for one in result["regimes"]) == result["requests"] > 300
    assert result["fraction_over_time"]["target"][-1] == pytest.approx(0.6, abs=0.001)
    with np.load(log) as steps:
        assert set(steps) == set(COLUMNS)
        assert (np.diff(steps["began_s"]) > 0).all()
    again = tmp_path / "again.json"
    assert invoke(*wanted, "--json", str(again)).exit_code == 0
    assert again.read_text() == out.read_text()


def test_a_setting_and_its_device_or_another_one(mine: str, tmp_path: Path) -> None:
    other, out = tmp_path / "other.json", tmp_path / "out.json"
    other.write_text(json.dumps(as_json(setting(slo_ms=7.0))), encoding="utf-8")
    wanted = ["--workload", mine, "--setting", str(other), "--emb-fraction", "0.3"]
    for flags, device in (([], "two CPU cores"), (["--profile", "l20-25gbe"], "L20")):
        done = invoke(*wanted, *flags, "--json", str(out))
        assert done.exit_code == 0, done.stderr
        assert "within 7 ms" in done.stdout
        assert json.loads(out.read_text())["profile"]["device"].startswith(device)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--workload", "nowhere"], "workload: 'nowhere'"),
        (["--workload", "none/such.json"], "none/such.json: No such file"),
        (["--profile", "nothing"], "profile: 'nothing'"),
        (["--setting", "nowhere"], "setting: 'nowhere'"),
        (["--setting", "production"], "regimes[0].item_zipf: means nothing"),
        (["--emb-fraction", "1.2"], "--emb-fraction: "),
        (["--at", "soon:0.5"], "--at: 'soon:0.5'"),
        (["--at", "5:1.5"], "--at: '5:1.5'"),
        (["--scale", "3"], "scale: must be a power of two from 1 to 64, not 3"),
        (["--scale", "128"], "scale: must be a power of two from 1 to 64, not 128"),
        (["--controller", "magic"], "controller: 'magic'"),
        (["--controller", "static:0.5", "--at", "5:0.5"], "--at: "),
        (["--json", "no/such/out.json"], "--json: no/such/out.json"),
        (["--routers", "2"], "--routers: nobody routes to a single engine"),
        (["--staleness", "1"], "--staleness: nobody routes to a single engine"),
        (["--engines", "0"], "--engines"),
        (["--engines", "2", "--routers", "0"], "--routers"),
        (["--engines", "2", "--staleness", "-1"], "--staleness"),
        (["--engines", "2", "--routing-policy", "magic"], "policy: must be one of"),
        (["--engines", "2", "--emb-spread", "0.8"], "emb_fraction: -0.1 to 0.7"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(mine: str, changes: list[str], named: str) -> None:
    done = invoke("--workload", mine, "--emb-fraction", "0.3", *changes)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("helm-engine: error: ")
    assert named in line


def test_at_a_scale_the_same_requests_meet_a_smaller_engine(mine: str, tmp_path: Path) -> None:
    written = []
    for scale in ("1", "4"):
        out = tmp_path / f"{scale}.json"
        wanted = ["--workload", mine, "--emb-fraction", "0.3", "--scale", scale]
        done = invoke(*wanted, "--json", str(out))
        assert done.exit_code == 0, done.stderr
        written.append(json.loads(out.read_text()))
    full, quarter = written
    assert (full["scale"], quarter["scale"]) == (1, 4)
    assert quarter["result"]["requests"] == full["result"]["requests"]
    assert quarter["result"]["emb_fraction"] == pytest.approx(0.3, abs=0.005)


def test_several_engines_behind_routers(mine: str, tmp_path: Path) -> None:
    out, log = tmp_path / "out.json", tmp_path / "steps.npz"
    wanted = ["--workload", mine, "--emb-fraction", "0.4", "--engines", "3", "--routers", "2"]
    wanted += ["--routing-policy", "kv", "--staleness", "0.5", "--emb-spread", "0.2"]
    done = invoke(*wanted, "--json", str(out), "--step-log", str(log))
    assert done.exit_code == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["setting"]["requests_per_s"] == 120.0
    result = written["result"]
    assert (result["policy"], result["routers"], result["staleness_s"]) == ("kv", 2, 0.5)
    assert result["emb_fractions_at_start"] == pytest.approx([0.3, 0.4, 0.5])
    engines = result["engines"]
    assert [one["name"] for one in engines] == ["engine-0", "engine-1", "engine-2"]
    assert sum(one["requests"] for one in engines) == result["requests"] > 900
    busy = [one["busy"] for one in engines]
    assert result["load_spread"] == pytest.approx(max(busy) / np.mean(busy))
    for one, share in zip(engines, (0.3, 0.4, 0.5), strict=True):
        assert one["fraction_over_time"]["committed"][-1] == pytest.approx(share, abs=0.001)
    with np.load(log) as steps:
        assert set(steps) == {*COLUMNS, "engine"}
        assert set(steps["engine"]) == {0, 1, 2}


def test_a_pool_that_is_too_small_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(as_json(workload(pool_bytes=1000))), encoding="utf-8")
    done = invoke("--workload", str(path), "--emb-fraction", "0.3")
    assert done.exit_code == 2
    assert "pool_bytes: 1000 is too small" in done.stderr

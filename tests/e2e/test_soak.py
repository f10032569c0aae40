"""A short soak: mixed traffic, reloads and hang-ups leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.process_samples import ProcessSample, mib_per_minute
from benchmarks.soak_traffic import KINDS
from tests.e2e.running_server import REPOSITORY


def test_nothing_is_left_behind_by_mixed_traffic(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--quick", "--json", str(result)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    # It checks statuses, connections, pages, file descriptors and the exit status itself.
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(result.read_text())["runs"]
    assert run["problems"] == []
    assert run["counts"].keys() == KINDS.keys()
    assert run["reloads"] == ["POST", "SIGHUP"]
    assert run["flat"]["core"]["processes"] == 3
    assert run["quiet_moments"] >= 4
    assert run["kv_evictions"] > 0
    assert run["emb_evictions"] > 0
    assert (run["engine_restarts"], run["exit_status"]) == (0, 0)


def sample(pid: int, seconds: float, mib: float) -> ProcessSample:
    return ProcessSample("core", pid, seconds, mib, mib, files=9, threads=3)


def test_a_leak_shows_through_noise_and_over_replaced_processes() -> None:
    grown = [
        sample(pid, second, 100.0 * pid + 0.05 * second + (second % 3) + 40.0 * (second == 17))
        for pid in (1, 2)
        for second in range(60)
    ]
    slope = mib_per_minute(grown)
    assert slope is not None
    assert abs(slope - 3.0) < 0.3


def test_the_step_from_one_process_to_the_next_is_no_growth() -> None:
    steps = [sample(second // 30, second, 100.0 + second // 30) for second in range(120)]
    assert mib_per_minute(steps) == 0.0
    assert mib_per_minute(steps[:1]) is None

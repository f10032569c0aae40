"""`helm-engine bench` against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running_server import BUNDLED_MODEL, REPOSITORY, RunningServer, running_server

# As the console script does, and then looks which modules were needed.
BENCH = (
    "import sys; from helm_engine.entrypoints.cli import app\n"
    "try: app()\n"
    "finally: assert 'torch' not in sys.modules, 'bench loaded torch'"
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One server for the module; its exit status is checked at the end."""
    with running_server(BUNDLED_MODEL) as running:
        yield running
        assert running.stop() == 0


def bench(server: RunningServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BENCH, "bench", server.address, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_open_loop_at_two_rates(server: RunningServer, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "load.json"), "--plot", str(tmp_path / "load.png")]
    done = bench(
        server, "--rate", "40", "--rate", "80", "--requests", "60", "--users", "10",
        "--deadline-ms", "60000", *files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "40/s" in done.stdout and "80/s" in done.stdout
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["model"] == "hstu-ml-100k"
    for run in result["runs"]:
        assert (run["sent"], run["ok"], run["errors"]) == (60, 60, {})
        assert run["cached_token_share"] > 0.0
        assert run["row_hit_share"] > 0.0
        assert run["p50_ms"] <= run["p95_ms"] <= run["p99_ms"]
        assert run["goodput_per_s"] == run["requests_per_s"]
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_closed_loop_of_retrievals(server: RunningServer) -> None:
    done = bench(server, "--concurrency", "4", "--requests", "40", "--candidates", "0")
    assert done.returncode == 0, done.stderr
    # On no terminal there is nothing but the table.
    assert done.stderr == ""
    assert "4 at once" in done.stdout


def test_what_the_server_refuses_is_said_in_its_words(server: RunningServer) -> None:
    done = bench(server, "--top-k", "5000", "--candidates", "0", "--requests", "5")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"helm-engine: error: {server.address}: 400: top_k: ")

"""The benchmark of faults in its short form: every request is answered once, whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.running_server import REPOSITORY


def test_every_request_is_answered_once_while_engines_fail(tmp_path: Path) -> None:
    result = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", "--quick", "--json", str(result)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(result.read_text(encoding="utf-8"))
    assert figures["answered"] == figures["sent"] > 0
    assert figures["answered_twice"] == figures["errors"] == 0
    assert figures["p99_before_ms"] > 0.0 and figures["p99_during_ms"] > 0.0
    (run,) = figures["runs"]
    assert set(run["back_after_s"]) == {"kill", "stop", "restart"}

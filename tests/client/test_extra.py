"""What importing the client needs, and says when it lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e.running_server import REPOSITORY


@pytest.mark.parametrize("missing", ["httpx", "msgspec"])
def test_a_missing_extra_is_named(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import helm_engine.client"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: helm_engine.client needs {missing}")
    assert "helm-engine[client]" in last

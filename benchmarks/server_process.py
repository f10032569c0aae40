"""A server of its own for a benchmark."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that can be reached."""

    address: str
    process: subprocess.Popen[str]

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.process.terminate()
        return self.process.wait(_STOP_SECONDS)


@contextmanager
def started(
    model_dir: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A server on a free port, killed at the end if it still runs.

    Args:
        model_dir: what it serves.
        flags: of `helm-engine serve`.
        environment: variables that it gets besides ours.

    Raises:
        SystemExit: it did not start.
    """
    serve = [sys.executable, "-m", "helm_engine.entrypoints.cli", "serve", str(model_dir)]
    process = subprocess.Popen(
        [*serve, "--port", "0", "--log-level", "warning", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stdout is not None
        address = re.search(r"on (http://\S+)", process.stdout.readline())
        if address is None:
            raise SystemExit("the server did not start")
        yield ServerProcess(address[1], process)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def served(model_dir: Path, *flags: str) -> Iterator[str]:
    """The address of a server on a free port; it must end with status 0.

    Raises:
        SystemExit: it did not start, or ended otherwise.
    """
    with started(model_dir, *flags) as server:
        try:
            yield server.address
        finally:
            status = server.stop()
    if status:
        raise SystemExit(f"the server ended with status {status}")

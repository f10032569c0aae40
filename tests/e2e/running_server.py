"""Starts `helm-engine serve` as a user would, and stops it with SIGTERM."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLED_MODEL = REPOSITORY / "examples" / "models" / "hstu-ml-100k"
_ADDRESS = re.compile(r"serves (\S+) on (http://\S+)")
_START_SECONDS = 120
_STOP_SECONDS = 30


def command(*arguments: str) -> list[str]:
    """The console script of this environment, with arguments."""
    script = Path(sys.executable).parent / "helm-engine"
    found = str(script) if script.exists() else shutil.which("helm-engine")
    assert found, "helm-engine is not installed in this environment"
    return [found, *arguments]


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that can be reached."""

    process: subprocess.Popen[str]
    address: str
    welcome: str
    """What it printed up to the curl line."""

    def post(
        self, body: object, path: str = "/v1/recommend", headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """Sends one request."""
        return httpx.post(self.address + path, json=body, headers=headers, timeout=30)

    def put(self, path: str, body: object, headers: dict[str, str]) -> httpx.Response:
        """Sets something."""
        return httpx.put(self.address + path, json=body, headers=headers, timeout=30)

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        """Asks for a page."""
        return httpx.get(self.address + path, headers=headers, timeout=30)

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_SECONDS)


@contextmanager
def running_server(model_dir: Path, *flags: str) -> Iterator[RunningServer]:
    """A server on a free port, killed at the end if it still runs."""
    process = subprocess.Popen(
        command("serve", str(model_dir), "--port", "0", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    # A server that hangs at its start must not hang the tests.
    watchdog = threading.Timer(_START_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None and process.stderr is not None
        welcome = ""
        for line in process.stdout:
            welcome += line
            if line.startswith("curl "):
                break
        watchdog.cancel()
        found = _ADDRESS.search(welcome)
        assert found, f"the server did not start: {welcome}{process.stderr.read()}"
        yield RunningServer(process, found[2], welcome)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()

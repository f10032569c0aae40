"""A server of its own for a benchmark."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(model_dir: Path, *flags: str) -> Iterator[str]:
    """The address of a server on a free port; it must end with status 0.

    Raises:
        SystemExit: it did not start, or ended otherwise.
    """
    serve = [sys.executable, "-m", "helm_engine.entrypoints.cli", "serve", str(model_dir)]
    server = subprocess.Popen(
        [*serve, "--port", "0", "--log-level", "warning", *flags],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = re.search(r"on (http://\S+)", server.stdout.readline())
        if address is None:
            raise SystemExit("the server did not start")
        yield address[1]
    finally:
        server.terminate()
        status = server.wait(30)
    if status:
        raise SystemExit(f"the server ended with status {status}")

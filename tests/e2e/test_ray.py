"""`helm-engine serve --ray` on a real Ray of one node: three replicas, of which one is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.dispatcher import EXPECTED_FOR_S
from tests.e2e.running_server import RunningServer, running_server
from tests.toy_models import toy_config, write_toy_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)

ADMIN = {"Authorization": "Bearer admin"}
REPLICAS = 3
USERS = [f"u{number}" for number in range(24)]
OTHERS = [f"u{number}" for number in range(100, 124)]
WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("ray") / "toy", toy_config())


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[RunningServer]:
    """One Ray for all tests of this file; what it started must be gone at its end."""
    flags = ("--num-engines", str(REPLICAS), "--pool-bytes", "4MiB", "--admin-key", "admin")
    with running_server(model, "--ray", *flags) as started:
        yield started
        below = descendants(started.process.pid)
        assert started.stop() == 0
        until(lambda: not any(map(is_alive, below)), "a process of this Ray outlives it")


def body(user: str) -> dict[str, Any]:
    number = int(user[1:])
    history = {
        "item_ids": [1 + (number + step) % 60 for step in range(20)],
        "timestamps": list(range(20)),
    }
    return {"user": user, "history": history, "candidates": {"item_ids": [5, 6, 7]}}


def cached_tokens(server: RunningServer, user: str) -> int:
    answer = server.post(body(user))
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["cached_tokens"])


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def replicas(server: RunningServer) -> set[int]:
    """The processes of the engines' replicas, by the title that Ray gives them."""
    return {
        pid
        for pid in descendants(server.process.pid)
        if b"ServeReplica:helm-engine:engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


def cores(server: RunningServer) -> int:
    (replicas_together,) = server.get("/info").json()["engines"]
    return int(replicas_together["cores"])


def restarts(server: RunningServer) -> float:
    return next(
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
        if sample.name == "helm:engine_restarts_total"
    )


def until(condition: Any, what: str) -> None:
    stop_waiting = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < stop_waiting, what
        time.sleep(0.05)


def test_scores_are_those_of_an_ordinary_server(server: RunningServer, model: Path) -> None:
    users = USERS[:6]
    with running_server(model, "--pool-bytes", "4MiB") as ordinary:
        expected = [ordinary.post(body(user)).json()["data"] for user in users]
    answered = [server.post(body(user)).json()["data"] for user in users]
    for ours, theirs in zip(answered, expected, strict=True):
        assert [row["item_id"] for row in ours] == [row["item_id"] for row in theirs]
        assert [row["score"] for row in ours] == pytest.approx(
            [row["score"] for row in theirs], abs=1e-5
        )


def test_a_users_second_request_follows_the_first(server: RunningServer) -> None:
    for user in USERS:
        cached_tokens(server, user)
    # From now on only what replicas have published tells where a history is.
    time.sleep(1.5 * EXPECTED_FOR_S)
    assert all(cached_tokens(server, user) > 0 for user in USERS)


def test_the_front_speaks_for_all_replicas(server: RunningServer) -> None:
    assert "helm:engine_requests_total" in server.get("/metrics").text
    moved = server.put("/v1/admin/boundary", {"emb_fraction": 0.5}, ADMIN)
    assert moved.status_code == 200, moved.text

    def arrived() -> bool:
        state = server.get("/v1/admin/boundary", ADMIN).json()
        return bool(state["target"] == 0.5 and state["lag_pages"] == 0)

    until(arrived, "the boundaries do not move")
    user = USERS[0]
    cached_tokens(server, user)
    forgotten = server.post({}, f"/v1/users/{user}:forget", ADMIN).json()
    assert forgotten["blocks_forgotten"] > 0
    assert cached_tokens(server, user) == 0
    refused = server.post({}, "/v1/admin/reload", ADMIN)
    assert refused.status_code == 409 and "deploying" in refused.text


def test_a_killed_replica_is_replaced_and_forgotten(server: RunningServer) -> None:
    # All at once, so that no replica gets them all: rows that are there attract other users.
    with ThreadPoolExecutor(len(OTHERS)) as clients:
        list(clients.map(lambda user: cached_tokens(server, user), OTHERS))
    before = replicas(server)
    assert len(before) == REPLICAS
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    hits = {user: cached_tokens(server, user) for user in OTHERS}
    lost = [user for user, tokens in hits.items() if tokens == 0]
    assert 0 < len(lost) < len(OTHERS), "those of the killed one, and no others"
    # They have found another replica, and it is known that they are there.
    assert all(cached_tokens(server, user) > 0 for user in lost)
    until(lambda: len(replicas(server)) == REPLICAS, "the replica is not replaced")
    assert killed not in replicas(server)
    until(lambda: cores(server) == REPLICAS and restarts(server) == 1, "the new one is not used")

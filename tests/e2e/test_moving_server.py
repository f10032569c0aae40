"""A server whose boundary is moved to and fro under load while its parameter server dies."""

from __future__ import annotations

import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.redis_server import RedisServer, running_redis
from helm_engine.recommender import Recommender
from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, command, running_server
from tests.e2e.test_faults import until
from tests.e2e.test_parameter_server import publish

ADMIN = {"Authorization": "Bearer of-the-boundary"}
BOUNDARY = "/v1/admin/boundary"
USERS = 24
VISITS = 6
SMALL_POOL = ("--pool-bytes", "3MiB", "--max-num-batched-tokens", "512")
"""213 pages: the KV of all users takes 290, and all rows 27."""
TOLERANCE = 1e-5
"""The gate's, of scores of about 1."""


def bodies_of(user: int) -> list[dict[str, Any]]:
    """A user's visits: each time a few events more, and other candidates."""
    numbers = np.random.default_rng(user)
    items = numbers.integers(1, 1600, size=150 + 8 * VISITS)
    times = np.cumsum(numbers.integers(1, 90_000, size=len(items)))
    found = []
    for visit in range(VISITS):
        events = 150 + 8 * visit
        candidates = np.unique(numbers.integers(1, 1600, size=40))
        found.append(
            {
                "user": f"user {user}",
                "history": {
                    "item_ids": items[:events].tolist(),
                    "timestamps": times[:events].tolist(),
                },
                "candidates": {"item_ids": candidates.tolist()},
            }
        )
    return found


def scores_of(data: list[dict[str, Any]]) -> dict[int, float]:
    return {item["item_id"]: item["score"] for item in data}


@dataclass
class Storm:
    """Clients, and whoever moves the boundary, until told to stop."""

    server: RunningServer
    wanted: dict[tuple[int, int], dict[int, float]]
    stopping: threading.Event = field(default_factory=threading.Event)
    answered: list[tuple[float, tuple[int, int], dict[int, float]]] = field(default_factory=list)
    refused: list[tuple[float, httpx.Response]] = field(default_factory=list)
    moves: int = 0

    def visit(self, user: int) -> None:
        bodies = bodies_of(user)
        with httpx.Client(base_url=self.server.address, timeout=30) as client:
            while not self.stopping.is_set():
                for visit, body in enumerate(bodies):
                    answer = client.post("/v1/recommend", json=body)
                    if answer.status_code == 200:
                        found = scores_of(answer.json()["data"])
                        self.answered.append((time.monotonic(), (user, visit), found))
                    else:
                        self.refused.append((time.monotonic(), answer))

    def move(self) -> None:
        share = 0.1
        with httpx.Client(base_url=self.server.address, timeout=30, headers=ADMIN) as client:
            while not self.stopping.wait(0.02):
                share = 1.0 - share
                answer = client.put(BOUNDARY, json={"emb_fraction": share})
                assert answer.status_code == 200, answer.text
                self.moves += 1

    def wait_for(self, number: int) -> None:
        """Until so many more answers have come."""
        enough = len(self.answered) + number
        until(lambda: len(self.answered) >= enough, "no answers come")

    def largest_difference(self) -> float:
        worst = 0.0
        for _, key, found in self.answered:
            wanted = self.wanted[key]
            assert found.keys() == wanted.keys()
            for item, score in wanted.items():
                worst = max(worst, abs(found[item] - score) / max(1.0, abs(score)))
        return worst


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[int, int], dict[int, float]]:
    """Scores of an engine whose boundary never moves, for each user and visit."""
    recommender = Recommender(BUNDLED_MODEL)
    found = {}
    for user in range(USERS):
        for visit, body in enumerate(bodies_of(user)):
            answer = recommender.recommend(body)
            found[user, visit] = {item.item_id: item.score for item in answer.data}
    return found


def storm_of(storm: Storm, rows: RedisServer | None = None) -> tuple[float, float] | None:
    """Runs a storm; if there is a parameter server it dies and comes back.

    Returns:
        When it died and when it could be read again.
    """
    outage = None
    with ThreadPoolExecutor(USERS + 1) as threads:
        try:
            tasks = [threads.submit(storm.visit, user) for user in range(USERS)]
            tasks.append(threads.submit(storm.move))
            storm.wait_for(300)
            if rows is not None:
                died = time.monotonic()
                rows.kill()
                until(lambda: len(storm.refused) > 30, "no request misses its rows")
                rows.start()
                # After an outage the engine asks again within a second.
                time.sleep(1.5)
                outage = died, time.monotonic()
                storm.wait_for(300)
        finally:
            storm.stopping.set()
        for task in tasks:
            task.result()
    return outage


def boundary_of(server: RunningServer) -> dict[str, Any]:
    state = httpx.get(server.address + BOUNDARY, headers=ADMIN, timeout=30)
    assert state.status_code == 200, state.text
    found: dict[str, Any] = state.json()
    return found


def test_scores_do_not_change_while_pages_change_hands_and_redis_dies(
    wanted: dict[tuple[int, int], dict[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELM_ADMIN_KEY", "of-the-boundary")
    with running_redis() as rows:
        assert publish(BUNDLED_MODEL, rows).returncode == 0
        flags = ("--host-tier", rows.url, "--host-tier-timeout", "0.5", "--poison-freed-memory")
        with running_server(BUNDLED_MODEL, *flags, *SMALL_POOL) as server:
            storm = Storm(server, wanted)
            outage = storm_of(storm, rows)
            assert outage is not None
            died, back = outage
            assert storm.moves > 10
            assert storm.largest_difference() <= TOLERANCE
            early = [answer.text for when, answer in storm.refused if not died <= when <= back]
            assert early == []
            for _, answer in storm.refused:
                assert answer.status_code == 503
                assert f"the parameter server at 127.0.0.1:{rows.port}" in answer.text
            until(lambda: boundary_of(server)["lag_pages"] == 0, "the boundary does not settle")
            # Ends with 0 only if no page, block or slot was lost.
            assert server.stop() == 0


def test_the_command_moves_the_boundary_and_floors_hold(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("HELM_ADMIN_KEY", "of-the-boundary")

    def boundary(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("boundary", *arguments), capture_output=True, text=True, timeout=60
        )

    with running_server(BUNDLED_MODEL, *SMALL_POOL, "--emb-fraction", "0.2") as server:
        done = boundary(server.address, "--emb-fraction", "0.6", "--wait", "20")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("target 0.600, committed 0.6") or done.stdout.startswith(
            "target 0.600, committed 0.59"
        )
        assert done.stdout.endswith("lag 0 pages\n")
        # All of it: KV keeps the blocks of one longest history, and requests are answered.
        assert boundary(server.address, "--emb-fraction", "1", "--wait", "20").returncode == 0
        state = boundary_of(server)
        assert (state["target"], state["lag_pages"]) == (1.0, 0)
        assert 0.9 < state["committed"] < 1.0
        answer = server.post(bodies_of(1)[0])
        assert answer.status_code == 200
        assert boundary(server.address, "--emb-fraction", "1.5").returncode == 2
        wrong = httpx.put(
            server.address + BOUNDARY, json={"emb_fraction": 1.5}, headers=ADMIN, timeout=30
        )
        assert wrong.status_code == 400
        assert "emb_fraction" in wrong.json()["error"]["message"]
        monkeypatch.setenv("HELM_ADMIN_KEY", "another")
        refused = boundary(server.address)
        assert refused.returncode != 0
        assert "admin key" in refused.stderr
        assert server.stop() == 0


def test_where_a_controller_moves_the_boundary_nobody_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HELM_ADMIN_KEY", "of-the-boundary")
    controlled = ("--emb-fraction", "0.2", "--controller", "static:0.5")
    with running_server(BUNDLED_MODEL, *SMALL_POOL, *controlled) as server:
        # An engine at rest is controlled too.
        until(lambda: boundary_of(server)["committed"] > 0.49, "the boundary does not move")
        refused = httpx.put(
            server.address + BOUNDARY, json={"emb_fraction": 0.3}, headers=ADMIN, timeout=30
        )
        assert refused.status_code == 409
        assert refused.json()["error"]["type"] == "controller_active_error"
        assert "--controller" in refused.json()["error"]["message"]
        assert boundary_of(server)["target"] == 0.5
        assert server.post(bodies_of(1)[0]).status_code == 200
        assert server.stop() == 0

"""Requests that take long: queues that fill, deadlines, hang-ups, and a server told to end."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, running_server

HISTORY = {"item_ids": [5] * 200, "timestamps": list(range(200))}
SLOW = {"history": HISTORY, "candidates": {"item_ids": list(range(1, 1683))}}
"""With two tokens a step it takes a thousand steps."""
QUICK = {"history": {"item_ids": [5], "timestamps": [1]}, "candidates": {"item_ids": [7]}}
FLAGS = ("--max-num-batched-tokens", "2", "--max-num-seqs", "1", "--max-num-waiting", "1")
WAIT_SECONDS = 60
Answers = queue.SimpleQueue[httpx.Response]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One request runs, one waits, further ones are refused."""
    with running_server(BUNDLED_MODEL, *FLAGS) as running:
        yield running
        wait_until(running, 0)
        assert metric(running, "helm:kv_cache_usage_perc") == 0.0
        assert running.stop() == 0


def metric(server: RunningServer, name: str, **labels: str) -> float:
    """A sample of `/metrics`, 0 where there is none yet."""
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


def wait_until(server: RunningServer, load: int) -> None:
    """Until that many requests run or wait."""
    until = time.monotonic() + WAIT_SECONDS
    while server.get("/load").json()["server_load"] != load:
        assert time.monotonic() < until, f"never were {load} requests in flight"


@contextmanager
def in_flight(server: RunningServer, body: Any = SLOW, number: int = 1) -> Iterator[Answers]:
    """Requests that are in flight within the block; their answers come to the queue."""
    answers: Answers = queue.SimpleQueue()
    asking = [
        threading.Thread(target=lambda: answers.put(server.post(body))) for _ in range(number)
    ]
    for place, thread in enumerate(asking):
        thread.start()
        wait_until(server, place + 1)
    yield answers
    for thread in asking:
        thread.join(WAIT_SECONDS)


def test_a_full_queue_is_429_with_the_time_to_come_back(server: RunningServer) -> None:
    with in_flight(server, number=2) as answers:
        refused = server.post(QUICK)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        # A body of several requests is not even read.
        assert server.post({"requests": [QUICK, {"history": {}}]}).status_code == 429
    assert [answers.get().status_code for _ in range(2)] == [200, 200]
    assert server.post(QUICK).status_code == 200


def test_a_body_that_does_not_come_in_time_gives_its_place_back() -> None:
    flags = ("--body-timeout", "0.3", "--max-num-seqs", "1", "--max-num-waiting", "1")
    with running_server(BUNDLED_MODEL, *flags) as server:
        host, port = server.address.removeprefix("http://").split(":")
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        with contextlib.ExitStack() as stack:
            slow = [
                stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(2)
            ]
            for one in slow:
                one.sendall(head)
            answers = [one.recv(4096) for one in slow]
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers), answers
        assert server.post(QUICK).status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize("body", [QUICK, SLOW])
def test_a_deadline_that_passes_is_504(server: RunningServer, body: dict[str, Any]) -> None:
    late = server.post({**body, "deadline_ms": 0.001})
    assert late.status_code == 504
    assert late.json()["error"]["type"] == "deadline_exceeded_error"
    assert server.post({**QUICK, "deadline_ms": 60_000}).status_code == 200


def test_a_deadline_passes_in_the_queue_too(server: RunningServer) -> None:
    with in_flight(server) as answers:
        assert server.post({**QUICK, "deadline_ms": 1}).status_code == 504
    assert answers.get().status_code == 200


def test_clients_that_hang_up_leave_nothing_behind(server: RunningServer) -> None:
    aborted = metric(server, "helm:request_failure_total", type="aborted_error")
    for body in (SLOW, {"requests": [SLOW, SLOW]}):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.address + "/v1/recommend", json=body, timeout=0.3)
        wait_until(server, 0)
    assert metric(server, "helm:kv_cache_usage_perc") == 0.0
    # Of three requests that run or wait at once at most two are taken in.
    assert metric(server, "helm:request_failure_total", type="aborted_error") >= aborted + 2
    assert server.post(QUICK).status_code == 200


def test_a_server_that_drains_answers_what_runs_and_refuses_the_rest() -> None:
    with running_server(BUNDLED_MODEL, *FLAGS, "--admin-key", "root") as server:
        admin = {"Authorization": "Bearer root"}
        with in_flight(server) as answers:
            server.process.terminate()
            until = time.monotonic() + WAIT_SECONDS
            while server.get("/health").status_code == 200:
                assert time.monotonic() < until, "a server that drains says that it is healthy"
            reload = httpx.post(server.address + "/v1/admin/reload", headers=admin)
            for refused in (server.get("/health"), server.get("/ping"), server.post(QUICK), reload):
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["type"] == "service_unavailable_error"
            assert answers.empty()
        assert answers.get().status_code == 200
        assert server.process.wait(WAIT_SECONDS) == 0

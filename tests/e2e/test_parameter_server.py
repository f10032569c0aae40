"""A server whose rows are in a real Redis: the same scores, and what clients see of an outage."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.redis_server import RedisServer, running_redis
from helm_engine.recommender import Recommender
from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, command, running_server
from tests.e2e.test_faults import core_of, counter, until
from tests.toy_models import toy_config, write_toy_model

HISTORY = {"item_ids": list(range(1, 40)), "timestamps": list(range(39))}


def publish(model: Path, server: RedisServer) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("publish-rows", str(model)),
        env={**os.environ, "HELM_HOST_TIER": server.url},
        capture_output=True,
        text=True,
        timeout=120,
    )


def body(user: str, first: int, number: int = 50) -> dict[str, Any]:
    """Candidates from an item on; the history is the same for all."""
    candidates = {"item_ids": list(range(first, first + number))}
    return {"user": user, "history": HISTORY, "candidates": candidates}


def scores(answer: httpx.Response) -> list[tuple[int, float]]:
    assert answer.status_code == 200, answer.text
    return [(item["item_id"], item["score"]) for item in answer.json()["data"]]


def answers(server: RunningServer, request: dict[str, Any]) -> bool:
    return server.post(request).status_code == 200


def by_class(server: RunningServer, name: str) -> dict[str, float]:
    return {
        sample.labels["class"]: sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


@pytest.fixture
def rows() -> Iterator[RedisServer]:
    with running_redis(password="open-sesame") as server:
        done = publish(BUNDLED_MODEL, server)
        assert done.returncode == 0, done.stderr
        assert "sesame" not in done.stdout + done.stderr
        assert f"127.0.0.1:{server.port}/0 holds " in done.stdout
        yield server


def test_scores_are_those_of_the_file_and_an_outage_fails_requests_by_name(
    rows: RedisServer,
) -> None:
    bodies = [body(f"user {n}", 1 + 20 * n, 20) for n in range(8)]
    bodies += [{"user": "finder", "history": HISTORY, "top_k": 20}]
    wanted = [
        [(item.item_id, item.score) for item in answer.data]
        for answer in map(Recommender(BUNDLED_MODEL).recommend, bodies)
    ]
    flags = ("--host-tier", rows.url, "--host-tier-timeout", "0.3")
    with running_server(BUNDLED_MODEL, *flags) as server:
        for request, expected in zip(bodies, wanted, strict=True):
            assert scores(server.post(request)) == expected
        _check_what_is_shown(server, rows)
        before, core = scores(server.post(body("ada", 1))), core_of(server)
        for round_, stop in enumerate((rows.kill, rows.freeze)):
            stop()
            # More in a row than a core takes of other failures.
            for number in range(30):
                answer = server.post(body(f"user {number}", 200 + 300 * round_ + 10 * number))
                assert answer.status_code == 503
                assert answer.headers["Retry-After"]
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("service_unavailable_error", 503)
                assert f"the parameter server at 127.0.0.1:{rows.port}/0" in error["message"]
                assert "sesame" not in answer.text
            assert by_class(server, "helm:host_read_failures_total")["demand_miss"] >= 30
            # What is in the pool needs no host tier.
            assert scores(server.post(body("ada", 1))) == before
            if stop == rows.kill:
                rows.start()
            else:
                rows.thaw()
            fresh = body("eve", 1000 + 100 * round_)
            until(partial(answers, server, fresh), "the engine does not see that its rows are back")
        assert core_of(server) == core
        assert counter(server, "helm:engine_restarts_total") == 0.0
        # Ends with 0 only if no page or block was leaked.
        assert server.stop() == 0
        assert server.process.stderr is not None
        log = server.process.stderr.read()
        assert "sesame" not in log and "Traceback" not in log
        # Once for each outage, from whichever thread reads.
        assert log.count("cannot be reached") == log.count("did not answer") == 1


def _check_what_is_shown(server: RunningServer, rows: RedisServer) -> None:
    shown = server.get("/info")
    source = f"redis://127.0.0.1:{rows.port}/0"
    link = {"refill_bytes_per_second": 64 << 20, "link_bytes_per_second": None}
    assert shown.json()["host_tier"] == {"source": source, "timeout": 0.3, **link}
    assert "sesame" not in shown.text
    carried = by_class(server, "helm:host_bytes_total")
    row_bytes = 4 * shown.json()["model_config"]["embedding_dim"]
    # Each candidate once at least; the warm-up and the history come on top.
    assert carried.pop("demand_miss") >= 8 * 20 * row_bytes
    assert carried == {"kv_onboarding": 0, "refill": 0}


def test_a_server_without_its_rows_does_not_start_and_says_why(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "toy", toy_config("stu"))
    with running_redis() as rows:

        def refusal() -> str:
            done = subprocess.run(
                command("serve", str(model), "--port", "0", "--log-level", "warning"),
                env={**os.environ, "HELM_HOST_TIER": rows.url},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert (done.returncode, done.stdout) == (2, "")
            (line,) = done.stderr.splitlines()
            return line.removeprefix("helm-engine: error: ")

        said = refusal()
        assert said.startswith("HELM_HOST_TIER: version: the parameter server at 127.0.0.1:")
        assert "publish-rows" in said
        rows.kill()
        assert "cannot be reached" in refusal()

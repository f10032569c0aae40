"""A real server of the bundled model: a request, bad requests, pages of status, and its end."""

from __future__ import annotations

import json
import queue
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from examples.hstu_training import load_whole, score_histories
from helm_engine.entrypoints.http_server import open_socket
from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, command, running_server

HISTORY = {"item_ids": [50, 172, 181], "timestamps": [100, 160, 220]}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One server for the module; its exit status is checked at the end."""
    with running_server(BUNDLED_MODEL) as running:
        yield running
        assert running.get("/health").status_code == 200
        assert running.stop() == 0


def plain_scores(histories: list[dict[str, Any]]) -> torch.Tensor:
    """Scores of all items by the plain padded PyTorch pass, [B, 1682]."""
    return score_histories(
        *load_whole(BUNDLED_MODEL),
        [np.array(history["item_ids"]) for history in histories],
        [np.array(history["timestamps"]) for history in histories],
        [history["timestamps"][-1] for history in histories],
    )


def test_the_printed_curl_works_as_it_stands(server: RunningServer) -> None:
    curl = shlex.split(server.welcome.splitlines()[-1])
    assert curl[:2] == ["curl", "-s"]
    url, header, data = curl[2], curl[4], curl[6]
    name, value = header.split(": ")
    answer = httpx.post(url, headers={name: value}, content=data).json()
    assert answer["object"] == "recommendation"
    assert len(answer["data"]) == 3


def test_retrieval_returns_the_best_items_of_a_plain_pass(server: RunningServer) -> None:
    answer = server.post({"user": "a", "history": HISTORY, "top_k": 20}).json()
    scores = plain_scores([HISTORY])[0]
    best = torch.argsort(-scores, stable=True)[:20] + 1
    assert [item["item_id"] for item in answer["data"]] == best.tolist()
    assert [item["index"] for item in answer["data"]] == list(range(20))
    assert answer["model"] == "hstu-ml-100k"
    assert answer["usage"]["history_tokens"] == 3


def test_without_top_k_ten_items_are_retrieved_and_all_candidates_are_scored(
    server: RunningServer,
) -> None:
    assert len(server.post({"history": HISTORY}).json()["data"]) == 10
    body = {"history": HISTORY, "candidates": {"item_ids": [9, 8, 9]}}
    assert len(server.post(body, "/recommend").json()["data"]) == 3


def test_candidates_keep_their_index_and_duplicates_score_alike(server: RunningServer) -> None:
    sent = [1682, 7, 1, 7, 1000]
    body = {"user": "b", "history": HISTORY, "candidates": {"item_ids": sent}}
    data = server.post(body).json()["data"]
    scores = plain_scores([HISTORY])[0]
    assert [sent[item["index"]] for item in data] == [item["item_id"] for item in data]
    assert [item["score"] for item in data] == sorted(
        (item["score"] for item in data), reverse=True
    )
    for item in data:
        assert item["score"] == pytest.approx(float(scores[item["item_id"] - 1]), abs=1e-5)
    twins = [item["score"] for item in data if item["item_id"] == 7]
    assert twins[0] == twins[1]


def test_exclude_history_leaves_out_all_events_sent_even_those_cut(server: RunningServer) -> None:
    items = [*range(1, 151), *range(200, 300)]
    history = {"item_ids": items, "timestamps": list(range(len(items)))}
    body = {"user": "c", "history": history, "top_k": 1682, "exclude_history": True}
    answer = server.post(body).json()
    assert answer["usage"]["history_tokens"] == 200
    assert len(answer["data"]) == 1682 - 250
    assert not {item["item_id"] for item in answer["data"]} & set(items)


def test_a_returning_user_is_answered_from_cached_tokens_and_resident_rows(
    server: RunningServer,
) -> None:
    items, times = list(range(155, 196)), list(range(41))
    history = {"item_ids": items[:40], "timestamps": times[:40]}
    server.post({"user": "returning", "history": history})
    longer = {"item_ids": items, "timestamps": times}
    body = {"user": "returning", "history": longer, "candidates": {"item_ids": [155, 156]}}
    usage = server.post(body).json()["usage"]
    assert usage["cached_tokens"] == 32
    # Rows 32..39 and the candidates were loaded before; the newest event's row is new.
    assert (usage["rows_requested"], usage["rows_resident"]) == (11, 10)
    assert set(usage["timings_ms"]) == {"queue", "load", "prefill", "score"}


def _changed(**changes: Any) -> dict[str, Any]:
    return {"history": dict(HISTORY), **changes}


BAD_BODIES: list[tuple[Any, int, str]] = [
    ({}, 400, "history"),
    ([], 400, "body"),
    (None, 400, "body"),
    (_changed(history={"item_ids": [], "timestamps": []}), 400, "history.item_ids"),
    (_changed(history={"item_ids": [1, 2], "timestamps": [1]}), 400, "history.timestamps"),
    (_changed(history={"item_ids": [1, 2]}), 400, "history.timestamps"),
    (_changed(history={**HISTORY, "actions": [1]}), 400, "history.actions"),
    (_changed(history={**HISTORY, "watch_ms": [1]}), 400, "history.watch_ms"),
    (_changed(history={**HISTORY, "item_ids": [1, 2, 1683]}), 400, "history.item_ids[2]"),
    (_changed(history={**HISTORY, "item_ids": [1, -2, 3]}), 400, "history.item_ids[1]"),
    (_changed(history={**HISTORY, "item_ids": [0, 2, 3]}), 400, "history.item_ids[0]"),
    (_changed(history={**HISTORY, "item_ids": [1, 2, 2**70]}), 400, "history.item_ids[2]"),
    (_changed(history={**HISTORY, "item_ids": [1, 2.5, 3]}), 400, "history.item_ids[1]"),
    (_changed(history={**HISTORY, "item_ids": [1, True, 3]}), 400, "history.item_ids[1]"),
    (_changed(history={**HISTORY, "item_ids": "123"}), 400, "history.item_ids"),
    (_changed(history={**HISTORY, "timestamps": [3, 2, 4]}), 400, "history.timestamps[1]"),
    (_changed(history={**HISTORY, "start_index": -1}), 400, "history.start_index"),
    (_changed(history=7), 400, "history"),
    (_changed(candidates={"item_ids": []}), 400, "candidates.item_ids"),
    (_changed(candidates={"item_ids": [1, 9999]}), 400, "candidates.item_ids[1]"),
    (_changed(candidates={"item_ids": [1], "actions": [1, 2]}), 400, "candidates.actions"),
    (_changed(candidates={"item_ids": [1] * 4097}), 413, "candidates.item_ids"),
    (_changed(top_k=0), 400, "top_k"),
    (_changed(top_k=-3), 400, "top_k"),
    (_changed(top_k=4097), 400, "top_k"),
    (_changed(top_k="5"), 400, "top_k"),
    (_changed(request_time=219), 400, "request_time"),
    (_changed(deadline_ms=0), 400, "deadline_ms"),
    (_changed(model="another"), 404, "model"),
    (_changed(context={"age": 3}), 400, "context"),
    (_changed(user=""), 400, "user"),
    (_changed(user=17), 400, "user"),
    (_changed(topk=5), 400, "topk"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES)
def test_bad_input_is_refused_and_the_field_is_named(
    server: RunningServer, body: Any, status: int, param: str
) -> None:
    answer = server.post(body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, status)
    assert param.split("[")[0] in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"not json", "body"),
        (b'{"history": ', "body"),
        (b"", "body"),
        (b"\xff\xfe", "body"),
        (b"[" * 100_000, "body"),
        (b'{"history": ' + b"9" * 5_000 + b"}", "body"),
        (b'{"history": {"item_ids": [1, NaN], "timestamps": [1, 2]}}', "history.item_ids[1]"),
        (b'{"history": {"item_ids": [1], "timestamps": [Infinity]}}', "history.timestamps[0]"),
        (
            b'{"history": {"item_ids": [1], "timestamps": [1]}, "deadline_ms": NaN}',
            "deadline_ms",
        ),
    ],
)
def test_a_body_that_is_no_proper_json_is_refused(
    server: RunningServer, content: bytes, param: str
) -> None:
    answer = httpx.post(
        server.address + "/v1/recommend",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_long_list_of_wrong_values_is_refused_by_its_first(server: RunningServer) -> None:
    answer = server.post({"history": {"item_ids": ["a"] * 1_000_000, "timestamps": []}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "history.item_ids[0]"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_before_it_is_parsed(
    server: RunningServer, chunked: bool
) -> None:
    limit = server.get("/info").json()["limits"]["max_body_bytes"]
    body = b" " * (limit + 1)
    answer = httpx.post(
        server.address + "/v1/recommend",
        content=iter([body[: limit // 2], body[limit // 2 :]]) if chunked else body,
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "body"
    assert str(limit) in answer.json()["error"]["message"]


def test_status_pages_say_what_is_served(server: RunningServer) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("hstu-ml-100k", "model")
    assert model["capabilities"]["cross_request_reuse"]["value"] is True
    assert server.get("/health").content == b""
    assert server.get("/version").json() == {"version": "0.1.0"}
    assert server.get("/info").json()["limits"]["max_top_k"] == 4096
    schema = server.get("/openapi.json").json()
    assert {"/v1/recommend", "/recommend", "/v1/models", "/health"} <= set(schema["paths"])
    missing = server.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)


def test_metrics_show_both_tenants_and_count_requests(server: RunningServer) -> None:
    server.post({"user": "metrics", "history": HISTORY})
    families = {
        family.name: family
        for family in text_string_to_metric_families(server.get("/metrics").text)
    }
    assert families["helm:kv_cache_usage_perc"].samples[0].value == 0.0
    assert 0.0 < families["helm:emb_cache_usage_perc"].samples[0].value <= 1.0
    total = [s for s in families["helm:request_success"].samples if s.name.endswith("_total")]
    assert total[0].value >= 1.0
    assert total[0].labels == {"model_name": "hstu-ml-100k"}


def test_both_tenants_evict_and_scores_stay_those_of_a_plain_pass() -> None:
    """A pool much smaller than users x histories, clients in parallel, users who return."""
    rng = np.random.default_rng(11)
    users = {}
    for number in range(24):
        items = rng.integers(1, 1683, 190).tolist()
        users[f"u{number}"] = (items, np.sort(rng.integers(0, 10**7, 190)).tolist())
    visits, histories = [], []
    for length in (120, 135, 150, 190):
        for user, (items, times) in users.items():
            history = {"item_ids": items[:length], "timestamps": times[:length]}
            histories.append(history)
            visits.append({"user": user, "history": history})
    want = plain_scores(histories)
    candidates = rng.permutation(np.arange(1, 1683))[:100].tolist()
    cached = resident = 0
    # 25 KV pages of 16 tokens hold two histories of 190; EMB has 640 slots for 1682 rows.
    flags = ["--pool-bytes", "500000", "--emb-fraction", "0.3"]
    flags += ["--max-num-batched-tokens", "256", "--poison-freed-memory"]
    with running_server(BUNDLED_MODEL, *flags) as server, httpx.Client(timeout=60) as client:
        for visit, scores in zip(visits, want, strict=True):
            body = {**visit, "candidates": {"item_ids": candidates}}
            for _ in range(2):  # Coming back at once meets KV; after 24 users it is gone.
                answer = client.post(server.address + "/v1/recommend", json=body).json()
                for item in answer["data"]:
                    assert item["score"] == pytest.approx(
                        float(scores[item["item_id"] - 1]), abs=1e-5
                    )
                cached += answer["usage"]["cached_tokens"]
                resident += answer["usage"]["rows_resident"]
        metrics = client.get(server.address + "/metrics").text
        assert server.stop() == 0
    assert cached > 0
    assert resident > 0
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert values["helm:emb_cache_usage_perc"] > 0.99
    assert values["helm:emb_cache_evictions_total"] > 0
    assert values["helm:kv_cache_evictions_total"] > 0


def test_a_client_that_hangs_up_frees_its_pages() -> None:
    with running_server(BUNDLED_MODEL, "--max-num-batched-tokens", "2") as server:
        history = {"item_ids": [5] * 200, "timestamps": list(range(200))}
        body = {"history": history, "candidates": {"item_ids": list(range(1, 1683))}}
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.address + "/v1/recommend", json=body, timeout=0.2)
        stop_waiting = time.monotonic() + 60
        while server.get("/load").json()["server_load"]:
            assert time.monotonic() < stop_waiting, "requests of clients that left still run"
        metrics = server.get("/metrics").text
        assert server.stop() == 0
    values = {
        (sample.name, sample.labels.get("type")): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert values["helm:kv_cache_usage_perc", None] == 0.0
    assert values["helm:request_success_total", None] == 0.0
    assert values["helm:request_failure_total", "aborted_error"] == 4.0


def test_sigterm_with_requests_in_flight_answers_them_and_exits_0() -> None:
    # Two tokens a step make each request take two hundred steps.
    with running_server(BUNDLED_MODEL, "--max-num-batched-tokens", "2") as server:
        history = {"item_ids": [5] * 200, "timestamps": list(range(200))}
        statuses: queue.SimpleQueue[int] = queue.SimpleQueue()

        def ask() -> None:
            try:
                statuses.put(server.post({"history": history}).status_code)
            except httpx.ConnectError:
                statuses.put(503)  # It came after the door was closed.

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        answered = [statuses.get(timeout=60)]
        assert server.stop() == 0
        answered += [statuses.get(timeout=60) for _ in clients[1:]]
        assert answered[0] == 200
        assert set(answered) <= {200, 503}


def test_requests_beyond_the_shutdown_timeout_are_answered_with_503() -> None:
    flags = ("--max-num-batched-tokens", "2", "--shutdown-timeout", "0")
    with running_server(BUNDLED_MODEL, *flags) as server:
        history = {"item_ids": [5] * 200, "timestamps": list(range(200))}
        body = {"history": history, "candidates": {"item_ids": list(range(1, 1683))}}
        answers: queue.SimpleQueue[httpx.Response] = queue.SimpleQueue()

        def ask() -> None:
            answers.put(server.post(body))

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        while server.get("/load").json()["server_load"] < 4:
            assert answers.empty(), "the requests ended before they all were in flight"
        assert server.stop() == 0
        for _ in clients:
            answer = answers.get(timeout=60)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == 503


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_model_loads_is_no_failure(number: signal.Signals) -> None:
    process = subprocess.Popen(
        command("serve", str(BUNDLED_MODEL), "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    # The first line of the log is written while the engine is being built.
    process.stdout.readline()
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in said


def _refused(*arguments: str) -> str:
    """Runs a command that must end with status 2; returns its one line of error."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_the_listening_socket_says_that_it_is_tcp() -> None:
    # What asyncio asks before it turns off Nagle's algorithm, which would delay every answer.
    with open_socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_a_port_in_use_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in _refused("serve", str(BUNDLED_MODEL), "--port", port)


def test_a_missing_model_directory_is_said_in_one_line() -> None:
    assert "no/such/model" in _refused("serve", "no/such/model", "--port", "0")


def test_a_pool_too_small_is_said_with_the_bytes_needed_and_that_many_suffice() -> None:
    line = _refused("serve", str(BUNDLED_MODEL), "--port", "0", "--pool-bytes", "1000")
    needed = line.split("at least ")[1].split()[0]
    with running_server(BUNDLED_MODEL, "--pool-bytes", needed) as server:
        answer = server.post({"history": HISTORY})
        assert answer.status_code == 200, json.dumps(answer.json())
        assert server.stop() == 0

"""Bodies over HTTP: JSON and msgpack, several requests in one, parts of answers, ids, limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helm_engine.protocol import ANSWER_FIELDS
from tests.e2e.running_server import BUNDLED_MODEL, RunningServer, running_server

JSON, MSGPACK = "application/json", "application/msgpack"
HISTORY = {"item_ids": [50, 172, 181], "timestamps": [100, 160, 220]}
BODY = {"history": HISTORY, "candidates": {"item_ids": [9, 8, 9]}}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
MAX_BODY_BYTES = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(BUNDLED_MODEL, "--max-body-bytes", "1MiB") as running:
        yield running
        assert running.get("/load").json() == {"server_load": 0}
        assert running.stop() == 0


def ask(server: RunningServer, body: Any, encoding: str = JSON, **headers: str) -> httpx.Response:
    encode = msgspec.json.encode if encoding == JSON else msgspec.msgpack.encode
    return httpx.post(
        server.address + "/v1/recommend",
        content=body if isinstance(body, bytes) else encode(body),
        headers={"Content-Type": encoding}
        | {name.replace("_", "-"): value for name, value in headers.items()},
        timeout=30,
    )


def decoded(answer: httpx.Response) -> Any:
    """The body by the type that the answer says it has."""
    if answer.headers["content-type"] == MSGPACK:
        return msgspec.msgpack.decode(answer.content)
    assert answer.headers["content-type"] == JSON
    return answer.json()


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    """Every plain value of a tree by its path."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: leaf for key, one in inner for p, leaf in leaves(one, (*path, key)).items()}
    return {path: value}


def test_msgpack_is_answered_as_json_is(server: RunningServer) -> None:
    plain, packed = ask(server, BODY), ask(server, BODY, MSGPACK)
    assert (plain.status_code, packed.status_code) == (200, 200)
    assert packed.headers["content-type"] == MSGPACK
    assert decoded(packed)["data"] == decoded(plain)["data"]
    assert leaves(decoded(packed)).keys() == leaves(decoded(plain)).keys()


def test_arrays_may_be_buffers_of_little_endian_integers(server: RunningServer) -> None:
    def packed(values: list[int]) -> bytes:
        return np.array(values, dtype="<i8").tobytes()

    buffers = {name: packed(values) for name, values in HISTORY.items()}
    body = {"history": buffers, "candidates": {"item_ids": packed([9, 8, 9])}}
    assert decoded(ask(server, body, MSGPACK))["data"] == decoded(ask(server, BODY))["data"]
    broken = {"history": {**buffers, "item_ids": buffers["item_ids"][:-1]}}
    refused = ask(server, broken, MSGPACK)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "history.item_ids"


@pytest.mark.parametrize("name", ["application/x-msgpack", "Application/VND.msgpack; v=1"])
def test_other_names_of_msgpack_are_known(server: RunningServer, name: str) -> None:
    assert ask(server, BODY, name).headers["content-type"] == MSGPACK


@pytest.mark.parametrize(
    ("accept", "sent", "answered"),
    [
        (MSGPACK, JSON, MSGPACK),
        (JSON, MSGPACK, JSON),
        ("*/*", MSGPACK, MSGPACK),
        ("text/html", MSGPACK, MSGPACK),
        ("application/msgpack;q=0.1, application/json", MSGPACK, JSON),
        ("application/msgpack; q=0", JSON, JSON),
    ],
)
def test_the_answer_comes_in_what_the_client_accepts(
    server: RunningServer, accept: str, sent: str, answered: str
) -> None:
    answer = ask(server, BODY, sent, Accept=accept)
    assert answer.headers["content-type"] == answered
    assert len(decoded(answer)["data"]) == 3


def test_bodies_of_types_that_nobody_reads_are_refused(server: RunningServer) -> None:
    for headers in ({"Content_Type": "text/csv"}, {"Content_Encoding": "gzip"}):
        refused = ask(server, BODY, **headers)
        (name,) = headers
        assert refused.status_code == 415
        assert refused.json()["error"]["param"] == name.replace("_", "-")


def test_without_a_type_a_body_is_json(server: RunningServer) -> None:
    answer = httpx.post(server.address + "/v1/recommend", content=msgspec.json.encode(BODY))
    assert "content-type" not in answer.request.headers
    assert answer.status_code == 200


@pytest.mark.parametrize("encoding", [JSON, MSGPACK])
def test_several_requests_are_answered_each_on_its_own(
    server: RunningServer, encoding: str
) -> None:
    bad = {"history": {**HISTORY, "item_ids": [1, 2, 9999]}}
    requests = [BODY, bad, 7, {**BODY, "fields": ["id"]}, {**BODY, "model": "other"}]
    answer = ask(server, {"requests": requests}, encoding, X_Request_Id="many")
    assert answer.status_code == 200
    whole = decoded(answer)
    assert (set(whole), whole["object"]) == ({"object", "data"}, "list")
    good, unknown, no_object, part, no_model = whole["data"]
    alone = decoded(ask(server, BODY))["data"]
    assert [item["item_id"] for item in good["data"]] == [item["item_id"] for item in alone]
    assert [item["score"] for item in good["data"]] == pytest.approx(
        [item["score"] for item in alone], abs=1e-5
    )
    assert good["id"] == "rec-many-0"
    assert part == {"id": "rec-many-3"}
    assert [one["error"]["code"] for one in (unknown, no_object, no_model)] == [400, 400, 404]
    assert unknown["error"]["param"] == "history.item_ids[2]"


def test_more_requests_than_the_limit_are_refused(server: RunningServer) -> None:
    limit = server.get("/info").json()["limits"]["max_requests"]
    assert len(decoded(ask(server, {"requests": [BODY] * limit}))["data"]) == limit
    refused = ask(server, {"requests": [BODY] * (limit + 1)})
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "requests")
    assert str(limit) in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"requests": []}, "requests"),
        ({"requests": {}}, "requests"),
        ({"requests": None}, "requests"),
        ({"requests": [BODY], "user": "a"}, "user"),
    ],
)
def test_requests_must_be_an_array_and_stand_alone(
    server: RunningServer, body: Any, param: str
) -> None:
    refused = ask(server, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("encoding", [JSON, MSGPACK])
def test_numbers_in_place_of_requests_are_refused_one_by_one(
    server: RunningServer, encoding: str
) -> None:
    answer = decoded(ask(server, {"requests": [1, 2]}, encoding))
    assert [one["error"]["code"] for one in answer["data"]] == [400, 400]


@settings(max_examples=40)
@given(paths=st.lists(st.sampled_from(ANSWER_FIELDS), min_size=1, max_size=6))
def test_fields_choose_exactly_their_part_of_the_answer(
    server: RunningServer, paths: list[str]
) -> None:
    whole = leaves(decoded(ask(server, BODY, X_Request_Id="same")))
    part = leaves(decoded(ask(server, {**BODY, "fields": paths}, X_Request_Id="same")))

    def is_chosen(path: tuple[str | int, ...]) -> bool:
        dotted = ".".join(name for name in path if isinstance(name, str)) + "."
        return any(dotted.startswith(f"{chosen}.") for chosen in paths)

    assert part.keys() == {path for path in whole if is_chosen(path)}
    for path, value in part.items():
        if path[0] in ("id", "object", "model", "data"):  # What no clock or cache decides.
            assert value == whole[path]


@pytest.mark.parametrize("fields", [[], ["nope"], ["data.nope"], "id", [1], ["id"] * 65])
def test_unknown_fields_are_refused(server: RunningServer, fields: Any) -> None:
    refused = ask(server, {**BODY, "fields": fields})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("fields")


def test_ids_are_taken_over_and_sent_back(server: RunningServer) -> None:
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    for path in ("/v1/recommend", "/health", "/v1/nothing"):
        method = "POST" if path == "/v1/recommend" else "GET"
        answer = httpx.request(
            method,
            server.address + path,
            json=BODY if method == "POST" else None,
            headers={"X-Request-Id": "order-7/1", "traceparent": parent},
        )
        assert answer.headers["x-request-id"] == "order-7/1"
        trace = re.fullmatch(f"00-{TRACE}-([0-9a-f]{{16}})-01", answer.headers["traceresponse"])
        assert trace is not None and trace[1] != "00f067aa0ba902b7"
        if method == "POST":
            assert answer.json()["id"] == "rec-order-7/1"


@pytest.mark.parametrize("request_id", ["", "with blank", "x" * 129, "a\tb", 'quo"te'])
@pytest.mark.parametrize("parent", ["", "00-0-0-00", f"00-{'0' * 32}-00f067aa0ba902b7-01"])
def test_malformed_ids_are_replaced(server: RunningServer, request_id: str, parent: str) -> None:
    headers = {"X-Request-Id": request_id, "traceparent": parent}
    answer = httpx.get(server.address + "/health", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    trace = re.fullmatch("00-([0-9a-f]{32})-[0-9a-f]{16}-00", answer.headers["traceresponse"])
    assert trace is not None and trace[1] != "0" * 32


def test_every_kind_of_too_much_is_413(server: RunningServer) -> None:
    padded = {**BODY, "user": "x" * MAX_BODY_BYTES}
    long = {"item_ids": [1] * 65_537, "timestamps": [1] * 65_537}
    for body, param in (
        (padded, "body"),
        ({"history": long}, "history.item_ids"),
        ({"history": HISTORY, "candidates": {"item_ids": [1] * 4097}}, "candidates.item_ids"),
    ):
        refused = ask(server, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (413, param)


def test_a_body_without_end_is_refused_while_it_comes(server: RunningServer) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 64 * MAX_BODY_BYTES:
            sent += 1 << 16
            yield b" " * (1 << 16)

    with httpx.Client(timeout=30) as client:
        try:
            answer = client.post(server.address + "/v1/recommend", content=endless())
            assert answer.status_code == 413
        except httpx.WriteError:
            pass  # The server closed the connection on the rest.
    assert server.get("/health").status_code == 200

"""Requests as a real HTTP server with scripted answers gets them, and its answers as read."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helm_engine import exceptions
from helm_engine.client import (
    Client,
    HelmError,
    History,
    InvalidAnswerError,
    RecommendParams,
    RecommendRequest,
    ServerConnectionError,
)
from helm_engine.exceptions import InvalidRequestError, ModelNotFoundError, QueueFullError
from helm_engine.protocol import Recommendation
from tests.client.asking import KINDS, Asking
from tests.client.stub_server import (
    RECOMMENDATION,
    Scripted,
    Stub,
    address_of,
    bound_socket,
    error_entry,
    serving,
)

HISTORY = {"item_ids": [1, 2], "timestamps": [10, 20]}


@pytest.fixture(params=KINDS)
def ask(request: pytest.FixtureRequest) -> Asking:
    return Asking(request.param)


@pytest.fixture(scope="module")
def running() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


@pytest.fixture
def stub(running: Stub) -> Stub:
    """Gives a good answer until told otherwise."""
    running.play(Scripted())
    return running


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_arrays_models_and_plain_values_are_sent_alike(
    ask: Asking, stub: Stub, encoding: str
) -> None:
    arrays = {"item_ids": np.array([1, 2], dtype=np.int32), "timestamps": (10, 20)}
    model = History(item_ids=np.array([1, 2]), timestamps=np.array([10, 20]))
    for history in (HISTORY, arrays, model, UserDict(HISTORY)):
        answer = ask(
            stub.address, "recommend", options={"encoding": encoding},
            user="u", history=history, candidates={"item_ids": range(3)},
            top_k=np.int64(3), exclude_history=True, model=None,
        )  # fmt: skip
        assert isinstance(answer, Recommendation)
        assert answer.data[0].item_id == 7
        assert answer.usage.timings_ms.queue == 0.0
    assert [received.body() for received in stub.received] == [
        {
            "user": "u",
            "history": HISTORY,
            "candidates": {"item_ids": [0, 1, 2]},
            "top_k": 3,
            "exclude_history": True,
        }
    ] * 4
    assert {received.headers["accept"] for received in stub.received} == {f"application/{encoding}"}
    assert {(received.method, received.raw_path) for received in stub.received} == {
        ("POST", "/v1/recommend")
    }


def test_the_arguments_are_the_fields_of_a_request() -> None:
    # Answers cut to some fields are no `Recommendation`.
    assert {*RecommendParams.__annotations__, "fields"} == set(RecommendRequest.model_fields)


def test_key_and_request_id_stand_in_headers(
    ask: Asking, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HELM_API_KEY", raising=False)
    ask(stub.address, "recommend", history=HISTORY)
    ask(stub.address, "recommend", options={"api_key": "k1"}, history=HISTORY, request_id="r-1")
    monkeypatch.setenv("HELM_API_KEY", "k2")
    ask(stub.address, "recommend", history=HISTORY)
    ask(stub.address, "recommend", options={"api_key": "k1"}, history=HISTORY)
    keys = [received.headers.get("authorization") for received in stub.received]
    assert keys == [None, "Bearer k1", "Bearer k2", "Bearer k1"]
    assert [received.headers.get("x-request-id") for received in stub.received][:2] == [None, "r-1"]


def test_fields_of_a_newer_server_are_ignored(ask: Asking, stub: Stub) -> None:
    newer: dict[str, Any] = {**RECOMMENDATION, "service_tier": "gold"}
    newer["data"] = [{**RECOMMENDATION["data"][0], "reason": "because"}]
    newer["usage"] = {**RECOMMENDATION["usage"], "joules": 3}
    stub.play(Scripted(body=newer))
    assert ask(stub.address, "recommend", history=HISTORY).data[0].score == 0.5


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_many_requests_are_one_body_and_errors_stand_in_their_place(
    ask: Asking, stub: Stub, encoding: str
) -> None:
    entries = [
        RECOMMENDATION,
        error_entry(400, "invalid_request_error", "history.item_ids[1]"),
        {**RECOMMENDATION, "id": "rec-2"},
        error_entry(429, "overloaded_error"),
        error_entry(418, "teapot_error"),
    ]
    requests = [
        {"history": HISTORY, "top_k": 1},
        RecommendRequest.model_validate({"history": HISTORY, "user": "u"}),
        {"history": {"item_ids": np.array([5])}},
        {"history": HISTORY, "deadline_ms": 50.0},
        {"history": HISTORY},
    ]
    stub.play(Scripted(body={"object": "list", "data": entries, "usage": 1}))
    answers = ask(stub.address, "recommend_many", requests, options={"encoding": encoding})
    (received,) = stub.received
    assert received.body() == {
        "requests": [
            {"history": HISTORY, "top_k": 1},
            {"history": HISTORY, "user": "u"},
            {"history": {"item_ids": [5]}},
            {"history": HISTORY, "deadline_ms": 50.0},
            {"history": HISTORY},
        ]
    }
    assert [answer.id for answer in (answers[0], answers[2])] == ["rec-1", "rec-2"]
    bad, full, teapot = answers[1], answers[3], answers[4]
    assert (type(bad), bad.param, str(bad)) == (
        InvalidRequestError, "history.item_ids[1]", "no: 400",
    )  # fmt: skip
    assert type(full) is QueueFullError
    assert (type(teapot), teapot.status, teapot.error_type) == (HelmError, 418, "teapot_error")


def test_status_pages(ask: Asking, stub: Stub) -> None:
    card = {
        "id": "m", "object": "model", "created": 3, "owned_by": "helm-engine", "root": "m",
        "parent": None, "max_model_len": 200, "dialect": "stu",
        "capabilities": {"chunked_prefill": {"value": True, "reason": "so"}}, "newer": 1,
    }  # fmt: skip
    stub.play(Scripted(body={"object": "list", "data": [card]}))
    (model,) = ask(stub.address, "models")
    assert (model.id, model.max_model_len, model.dialect) == ("m", 200, "stu")
    assert model.capabilities["chunked_prefill"] == {"value": True, "reason": "so"}
    stub.play(Scripted(body={"limits": {"max_top_k": 5}}))
    assert ask(stub.address, "info") == {"limits": {"max_top_k": 5}}


@pytest.mark.parametrize(
    ("user", "path"),
    [
        ("u 1", "/v1/users/u%201:forget"),
        ("a/b?c#d", "/v1/users/a%2Fb%3Fc%23d:forget"),
        ("%2F:forget", "/v1/users/%252F%3Aforget:forget"),
        ("ü", "/v1/users/%C3%BC:forget"),
        ("..", "/v1/users/..:forget"),
    ],
)
def test_forget_names_the_user_in_the_path(ask: Asking, stub: Stub, user: str, path: str) -> None:
    body = {"user": user, "blocks_forgotten": 3, "newer": True}
    stub.play(Scripted(body=body))
    forgotten = ask(stub.address, "forget", user)
    assert (forgotten.user, forgotten.blocks_forgotten) == (user, 3)
    (received,) = stub.received
    assert (received.method, received.raw_path, received.content) == ("POST", path, b"")


def test_health_is_asked_once_and_no_is_an_answer(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(body=b""))
    assert ask(stub.address, "health") is True
    stub.play(Scripted(503, error_entry(503, "service_unavailable_error")))
    assert ask(stub.address, "health") is False
    assert len(stub.received) == 1
    with bound_socket() as nobody:
        assert ask(address_of(nobody), "health") is False
    stub.play(Scripted(401, error_entry(401, "authentication_error")))
    with pytest.raises(HelmError, match="no: 401"):
        ask(stub.address, "health")
    assert ask.sleeps == []


ERRORS = [
    error
    for error in vars(exceptions).values()
    if isinstance(error, type) and issubclass(error, HelmError)
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_every_error_of_the_server_comes_back(
    ask: Asking, stub: Stub, error: type[HelmError], encoding: str
) -> None:
    body = error_entry(error.status, error.error_type, "history")
    stub.play(Scripted(error.status, body))
    with pytest.raises(HelmError, match=f"no: {error.status}") as raised:
        ask(
            stub.address, "recommend", history=HISTORY,
            options={"encoding": encoding, "max_retries": 0},
        )  # fmt: skip
    # Classes of one status and type look alike from here.
    assert (raised.value.status, raised.value.error_type) == (error.status, error.error_type)
    assert type(raised.value).status == error.status
    assert raised.value.param == "history"


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (418, HelmError, b"short and stout"),
        (502, HelmError, b"<html>bad gateway</html>"),
        (599, HelmError, b""),
        (307, HelmError, b""),
        (422, HelmError, b'{"detail": [{"msg": "no"}]}'),
        (429, QueueFullError, b"slow down"),
    ],
)
def test_errors_of_others_keep_their_status(
    ask: Asking, stub: Stub, status: int, kind: type[HelmError], body: bytes
) -> None:
    stub.play(Scripted(status, body))
    with pytest.raises(HelmError) as raised:
        ask(stub.address, "recommend", history=HISTORY, options={"max_retries": 0})
    assert type(raised.value) is kind
    assert raised.value.status == status
    assert body.decode() in str(raised.value)
    assert str(status) in str(raised.value)


def test_an_unknown_path_is_no_unknown_model(ask: Asking, stub: Stub) -> None:
    for error_type, kind in (
        ("invalid_request_error", HelmError),
        ("not_found_error", ModelNotFoundError),
    ):
        stub.play(Scripted(404, error_entry(404, error_type)))
        with pytest.raises(HelmError) as raised:
            ask(stub.address, "forget", "u")
        assert type(raised.value) is kind
        assert raised.value.status == 404


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(body=b"not json"),
        Scripted(body=b""),
        Scripted(body=b"\x81", headers={"content-type": "application/msgpack"}),
        Scripted(body=b"[" * 100_000),
        Scripted(body=[1]),
        Scripted(body={**RECOMMENDATION, "data": [{"index": "x"}]}),
        Scripted(body={"id": "rec-1"}),
        Scripted(body=b"zzz", headers={"content-encoding": "gzip"}),
    ],
)
def test_garbage_is_said_to_be_garbage(ask: Asking, stub: Stub, answer: Scripted) -> None:
    stub.play(answer)
    with pytest.raises((InvalidAnswerError, ServerConnectionError)) as raised:
        ask(stub.address, "recommend", history=HISTORY)
    assert len(stub.received) == 1
    assert "answer" in str(raised.value)


@pytest.mark.parametrize(
    "data", [[], [RECOMMENDATION] * 2, [{"error": 3}], ["x"], None, [{"error": {"message": 1}}]]
)
def test_a_list_of_other_things_is_garbage(ask: Asking, stub: Stub, data: Any) -> None:
    stub.play(Scripted(body={"object": "list", "data": data}))
    with pytest.raises(InvalidAnswerError):
        ask(stub.address, "recommend_many", [{"history": HISTORY}])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": float("nan")}, "deadline_ms"),
        ({"deadline_ms": "5"}, "deadline_ms"),
        ({"deadline_ms": [5]}, "deadline_ms"),
        ({"user": "\ud800"}, "user"),
        ({"context": {"a": object()}}, "context"),
        ({"fields": ["id"]}, "fields"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": ""}, "request_id"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(
    ask: Asking, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=field) as raised:
        ask("http://127.0.0.1:9", "recommend", history=HISTORY, **arguments)
    assert raised.value.param == field


def test_what_cannot_be_sent_among_many_is_named(ask: Asking) -> None:
    requests = [{"history": HISTORY}, {"history": HISTORY, "deadline_ms": -1}]
    with pytest.raises(InvalidRequestError) as raised:
        ask("http://127.0.0.1:9", "recommend_many", requests)
    assert raised.value.param == "requests[1].deadline_ms"
    for user in ("", "\ud800"):
        with pytest.raises(InvalidRequestError, match="user"):
            ask("http://127.0.0.1:9", "forget", user)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url"),
        ({"base_url": "ftp://host"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host/?a=1"}, "base_url"),
        ({"base_url": "http://host:port"}, "base_url"),
        ({"api_key": "a\nb"}, "api_key"),
        ({"api_key": "ü"}, "api_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"encoding": "xml"}, "encoding"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Client(**options)


def test_a_server_below_a_path_is_reached(ask: Asking, stub: Stub) -> None:
    ask(stub.address + "/helm/", "recommend", history=HISTORY)
    assert stub.received[0].raw_path == "/helm/v1/recommend"

"""The client, its documentation and the `openai` package against a real server."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from helm_engine.client import Client, History, Recommendation, RecommendRequest
from helm_engine.exceptions import DeadlineExceededError, InvalidRequestError, ModelNotFoundError
from tests.client.asking import KINDS, Asking
from tests.e2e.running_server import BUNDLED_MODEL, REPOSITORY, RunningServer, running_server

HISTORY = {"item_ids": [50, 172, 181], "timestamps": [100, 160, 220]}
DOCUMENT = (REPOSITORY / "docs" / "client.md").read_text(encoding="utf-8")
DOCUMENTED_ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(BUNDLED_MODEL) as running:
        yield running
        assert running.stop() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_plain_http(server: RunningServer, kind: str) -> None:
    ask = Asking(kind)
    plain = server.post({"history": HISTORY, "candidates": {"item_ids": [7, 9, 7]}}).json()
    arrays = {name: np.array(values) for name, values in HISTORY.items()}
    for history in (HISTORY, arrays, History.model_validate(arrays)):
        answer = ask(
            server.address, "recommend", history=history,
            candidates={"item_ids": np.array([7, 9, 7])}, deadline_ms=30_000,
        )  # fmt: skip
        assert [(item.index, item.item_id) for item in answer.data] == [
            (item["index"], item["item_id"]) for item in plain["data"]
        ]
        assert [item.score for item in answer.data] == pytest.approx(
            [item["score"] for item in plain["data"]], abs=1e-5
        )
        assert answer.usage.history_tokens == 3
        assert answer.model == "hstu-ml-100k"


@pytest.mark.parametrize("kind", KINDS)
def test_status_pages_and_errors(server: RunningServer, kind: str) -> None:
    ask = Asking(kind)
    (model,) = ask(server.address, "models")
    (plain,) = server.get("/v1/models").json()["data"]
    assert (model.id, model.dialect) == (plain["id"], plain["dialect"])
    assert model.capabilities == plain["capabilities"]
    assert ask(server.address, "info") == server.get("/info").json()
    assert ask(server.address, "health") is True
    with pytest.raises(InvalidRequestError, match="unknown item 5000") as raised:
        ask(server.address, "recommend", history={"item_ids": [5000], "timestamps": [1]})
    assert raised.value.param == "history.item_ids[0]"
    with pytest.raises(ModelNotFoundError):
        ask(server.address, "recommend", history=HISTORY, model="another")
    with pytest.raises(DeadlineExceededError):
        ask(server.address, "recommend", history=HISTORY, deadline_ms=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_many_requests_and_a_forgotten_user(
    server: RunningServer, kind: str, encoding: str
) -> None:
    ask, options = Asking(kind), {"encoding": encoding}
    user = f"forget/{kind} {encoding}"
    long = {"item_ids": np.arange(1, 41), "timestamps": np.arange(40)}
    requests = [
        {"user": user, "history": long},
        {"history": {"item_ids": [5000], "timestamps": [1]}},
        {"history": HISTORY, "top_k": 2},
    ]
    first, refused, last = ask(server.address, "recommend_many", requests, options=options)
    plain = server.post({"history": HISTORY, "top_k": 2}).json()
    assert (len(first.data), [item.item_id for item in last.data]) == (
        10, [item["item_id"] for item in plain["data"]],
    )  # fmt: skip
    assert isinstance(refused, InvalidRequestError)
    assert "item_ids[0]" in str(refused.param)
    again = {"user": user, "history": long, "request_id": "client-1"}
    assert ask(server.address, "recommend", options=options, **again).usage.cached_tokens > 0
    forgotten = ask(server.address, "forget", user, options=options)
    assert forgotten.user == user
    assert forgotten.blocks_forgotten > 0
    assert ask(server.address, "recommend", options=options, **again).usage.cached_tokens == 0


def _blocks() -> list[tuple[str, str, str]]:
    """Language, text, and what the document says that it prints ("" = not shown)."""
    found = re.findall(r"```(\w+)\n(.*?)```(?:\n\n```text\n(.*?)```)?", DOCUMENT, flags=re.DOTALL)
    return [(language, text, shown) for language, text, shown in found if language != "text"]


@pytest.mark.parametrize("block", _blocks(), ids=lambda block: block[1].split("\n")[0][:40])
def test_examples_of_the_document_print_what_it_shows(
    server: RunningServer, block: tuple[str, str, str]
) -> None:
    language, text, shown = block
    assert DOCUMENTED_ADDRESS in text
    text = text.replace(DOCUMENTED_ADDRESS, server.address)
    if language == "sh":
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
        assert '"object":"recommendation"' in done.stdout.replace(" ", "")
        return
    assert language == "python"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "docs/client.md", "exec"), {"__name__": "example"})
    assert printed.getvalue() == shown


def test_the_document_shows_all_three_ways() -> None:
    blocks = _blocks()
    assert [language for language, _, _ in blocks].count("sh") == 1
    for name in ("Client(", "AsyncClient(", "openai.OpenAI("):
        assert any(name in text for _, text, _ in blocks)


def test_the_openai_package_works_and_carries_our_error(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        body: dict[str, Any] = {"user": "o", "history": HISTORY, "top_k": 4}
        answer: Any = client.post("/recommend", body=body, cast_to=object)
        plain = server.post(body).json()
        assert [item["item_id"] for item in answer["data"]] == [
            item["item_id"] for item in plain["data"]
        ]
        with pytest.raises(openai.BadRequestError) as raised:
            client.post("/recommend", body={**body, "top_k": 0}, cast_to=object)
        error = server.post({**body, "top_k": 0}).json()["error"]
        assert raised.value.body == error
        assert (raised.value.param, raised.value.type) == ("top_k", "invalid_request_error")
        assert error["message"] in str(raised.value)
        with pytest.raises(openai.NotFoundError):
            client.post("/recommend", body={**body, "model": "another"}, cast_to=object)
        assert [model.id for model in client.models.list()] == ["hstu-ml-100k"]


def test_calls_as_a_type_checker_sees_them(server: RunningServer) -> None:
    # mypy reads these lines; `Asking` hides the signatures from it.
    with Client(server.address) as client:
        request = RecommendRequest.model_validate({"history": HISTORY})
        answer: Recommendation = client.recommend(user="t", history=request.history, top_k=None)
        assert len(answer.data) == 10

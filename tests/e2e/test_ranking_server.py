"""A real server of a ranking model: tasks in the answer, and errors that name the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.running_server import RunningServer, running_server
from tests.toy_models import toy_config, write_toy_model

BODY: dict[str, Any] = {
    "user": "ada",
    "history": {
        "item_ids": [7, 3, 59],
        "timestamps": [100, 160, 4000],
        "actions": [1, 0, 5],
        "category": [0, 6, 2],
    },
    "candidates": {"item_ids": [1, 40, 1], "category": [3, 4, 3]},
    "context": {"user_id": 4999, "device": 3},
    "request_time": 5000,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the module; its exit status is checked at the end."""
    directory = write_toy_model(
        tmp_path_factory.mktemp("models") / "toy-stu", toy_config("stu", rank_by="dwell")
    )
    with running_server(directory) as running:
        yield running
        assert running.stop() == 0


def test_every_item_has_the_scores_of_all_tasks_and_that_of_the_ranking_one(
    server: RunningServer,
) -> None:
    answer = server.post(BODY)
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert {item["index"] for item in data} == {0, 1, 2}
    for item in data:
        assert item.keys() == {"index", "item_id", "score", "task_scores"}
        assert item["task_scores"].keys() == {"click", "dwell"}
        assert item["score"] == item["task_scores"]["dwell"]
    assert [item["score"] for item in data] == sorted(
        (item["score"] for item in data), reverse=True
    )
    usage = answer.json()["usage"]
    assert (usage["history_tokens"], usage["candidates"]) == (5, 3)
    # Items 7, 3, 59, 1 and 40; the user's own table counts from 70 events and candidates on.
    assert usage["rows_requested"] == 5


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"candidates": None}, "candidates"),
        ({"history": {**BODY["history"], "item_ids": [[7, 3], [59]]}}, "history.item_ids[0]"),
        ({"context": {"user_id": 1}}, "context.device"),
        ({"context": {"user_id": 1, "device": 4}}, "context.device"),
        ({"context": {"user_id": True, "device": 3}}, "context.user_id"),
        ({"context": {**BODY["context"], "age": 3}}, "context.age"),
        ({"candidates": {"item_ids": [1, 2], "category": [1, 7]}}, "candidates.category[1]"),
        ({"candidates": {"item_ids": [1, 2], "category": [1]}}, "candidates.category"),
        ({"candidates": {"item_ids": [1, 2]}}, "candidates.category"),
        ({"history": {**BODY["history"], "actions": [1, 0, 32]}}, "history.actions[2]"),
        ({"history": {**BODY["history"], "actions": None}}, "history.actions"),
        ({"history": {**BODY["history"], "category": [0, 6, 2.0]}}, "history.category[2]"),
        ({"history": {**BODY["history"], "category": [0, 6, 2**70]}}, "history.category[2]"),
    ],
)
def test_bad_features_are_refused_and_the_field_is_named(
    server: RunningServer, changes: dict[str, Any], param: str
) -> None:
    answer = server.post({**BODY, **changes})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


def test_models_page_says_why_nothing_is_reused_between_requests(server: RunningServer) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    reuse = model["capabilities"]["cross_request_reuse"]
    assert reuse["value"] is False
    assert "positions count from the newest event" in reuse["reason"]
    assert model["capabilities"]["chunkable"]["value"] is True


def test_more_candidates_than_the_model_reads_are_too_many(server: RunningServer) -> None:
    many = {"item_ids": [1] * 61, "category": [0] * 61}
    answer = server.post({**BODY, "candidates": many})
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "candidates.item_ids"

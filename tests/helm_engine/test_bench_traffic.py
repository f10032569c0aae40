"""What `bench` asks: every served model accepts it, and users come back."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from helm_engine.bench.target import Target
from helm_engine.bench.traffic import TrafficConfig, request_bodies
from helm_engine.body_codec import decode_request
from helm_engine.config import RequestLimits
from helm_engine.recommender import Recommender
from model_executor.model_config import ModelConfig
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model

SMALL = TrafficConfig(users=3, new_events=3, candidates=5, seed=1)


def target(model: ModelConfig, **limits: int) -> Target:
    return Target("http://nowhere", "0", "toy", model, RequestLimits(**limits))


def bodies(model: ModelConfig, config: TrafficConfig, number: int) -> list[dict[str, Any]]:
    return [json.loads(body) for body in islice(request_bodies(target(model), config), number)]


@pytest.mark.parametrize("dialect", sorted(TOY_CONFIGS))
def test_an_engine_of_each_dialect_accepts_all_of_it(dialect: str, tmp_path: Path) -> None:
    model = toy_config(dialect)
    recommender = Recommender.from_config(
        toy_engine_config(write_toy_model(tmp_path / "toy", model), num_pages=60)
    )
    stream = request_bodies(target(model), SMALL)
    cached = 0
    for raw in islice(stream, 30):
        answer = recommender.recommend(decode_request(raw))
        assert len(answer.data) == 5
        cached += answer.usage.cached_tokens
    # As published, a DLRMv3's positions forbid reuse.
    assert (cached > 0) == (dialect != "stu")


@pytest.mark.parametrize("dialect", ["research", "sasrec"])
def test_without_candidates_the_catalogue_is_asked(dialect: str, tmp_path: Path) -> None:
    model = toy_config(dialect)
    recommender = Recommender.from_config(
        toy_engine_config(write_toy_model(tmp_path / "toy", model))
    )
    config = replace(SMALL, candidates=0, top_k=7, deadline_ms=60_000.0)
    for raw in islice(request_bodies(target(model), config), 5):
        asked = decode_request(raw)
        assert asked.candidates is None
        assert asked.deadline_ms == 60_000.0
        assert len(recommender.recommend(asked).data) == 7


def test_a_user_comes_back_with_what_they_brought_before_and_new_events() -> None:
    seen: dict[str, dict[str, list[int]]] = {}
    returns = 0
    for body in bodies(toy_config("stu"), SMALL, 60):
        before = seen.get(body["user"])
        if before is not None:
            returns += 1
            for name, values in body["history"].items():
                assert values[: len(before[name])] == before[name]
                assert len(values) == len(before[name]) + SMALL.new_events
        seen[body["user"]] = body["history"]
    assert returns > 20


def test_an_item_has_the_same_features_wherever_it_appears() -> None:
    features: dict[int, int] = {}
    for body in bodies(toy_config("stu"), SMALL, 60):
        for events in (body["history"], body["candidates"]):
            for item, category in zip(events["item_ids"], events["category"], strict=True):
                assert features.setdefault(item, category) == category
    assert len(set(features.values())) == 7


def test_the_seed_decides_everything() -> None:
    model = toy_config("nvidia")
    assert bodies(model, SMALL, 20) == bodies(model, SMALL, 20)
    assert bodies(model, SMALL, 20) != bodies(model, replace(SMALL, seed=2), 20)


def test_defaults_fit_the_server() -> None:
    stream = request_bodies(target(toy_config("stu"), max_candidates=50), TrafficConfig(users=2))
    body = json.loads(next(stream))
    assert len(body["history"]["item_ids"]) == 12
    assert len(body["candidates"]["item_ids"]) == 50


@pytest.mark.parametrize(
    ("dialect", "changes", "message"),
    [
        ("research", {"history": 101}, "--history: the server takes at most 100 events"),
        ("research", {"candidates": 71}, "--candidates: the server takes at most 70"),
        ("stu", {"candidates": 61}, "--candidates: the server takes at most 60"),
        ("nvidia", {"candidates": 0}, "--candidates: this model ranks"),
    ],
)
def test_what_the_server_would_refuse_is_refused_before(
    dialect: str, changes: dict[str, Any], message: str
) -> None:
    asked = target(toy_config(dialect), max_history_events=100, max_candidates=70)
    with pytest.raises(ValueError, match=message):
        request_bodies(asked, replace(SMALL, **changes))

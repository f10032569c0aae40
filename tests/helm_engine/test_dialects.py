"""Models of all dialects through the engine: answers with tasks, refusals, reuse, bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helm_engine.config import ExecutorConfig
from helm_engine.exceptions import InvalidRequestError
from helm_engine.protocol import RecommendedItem
from helm_engine.recommender import Recommender
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model

CANDIDATES = [5, 40, 3, 22, 1, 57]
CATEGORIES = [0, 6, 2, 2, 1, 5]

MakeRecommender = Callable[..., Recommender]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeRecommender]:
    """Engines over toy models, which must be idle and whole afterwards."""
    made: list[Recommender] = []

    def build(
        dialect: str, *, tokens: int = 64, dtype: str = "float32", **changes: Any
    ) -> Recommender:
        directory = tmp_path / f"{dialect}-{len(made)}"
        write_toy_model(directory, toy_config(dialect, **changes), seed=4)
        config = toy_engine_config(directory, num_pages=40, max_num_batched_tokens=tokens)
        config = replace(config, executor=ExecutorConfig(dtype=dtype))
        made.append(Recommender.from_config(config))
        return made[-1]

    yield build
    for recommender in made:
        recommender.engine.core.check_nothing_leaked()
        recommender.engine.core.check_integrity()


def body(dialect: str, num_events: int = 9, first: int = 0, **fields: Any) -> dict[str, Any]:
    """Events first .. first + num_events - 1 of a user who always did the same."""
    rng = np.random.default_rng(8)
    events = {
        "item_ids": rng.integers(1, 60, 60),
        "timestamps": np.sort(rng.integers(0, 10**6, 60)),
        "actions": rng.integers(0, 9, 60),
        "category": rng.integers(0, 7, 60),
    }
    kept = slice(first, first + num_events)
    history: dict[str, Any] = {name: values[kept].tolist() for name, values in events.items()}
    request: dict[str, Any] = {
        "history": history,
        "candidates": {"item_ids": CANDIDATES, "category": CATEGORIES},
    }
    if dialect == "stu":
        request["context"] = {"user_id": 17, "device": 2}
    return request | fields


def by_place(items: list[RecommendedItem]) -> list[RecommendedItem]:
    return sorted(items, key=lambda item: item.index)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("rank_by", [None, "click", "dwell"])
def test_items_of_stu_bring_a_score_per_task_and_are_ranked_by_one(
    make: MakeRecommender, rank_by: str | None
) -> None:
    answer = make("stu", rank_by=rank_by).recommend(body("stu"))
    assert len(answer.data) == len(CANDIDATES)
    for item in answer.data:
        assert item.task_scores is not None
        assert list(item.task_scores) == ["click", "dwell"]
        assert item.score == item.task_scores[rank_by or "click"]
        assert 0.0 < item.task_scores["click"] < 1.0
        assert item.item_id == CANDIDATES[item.index]
    scores = [item.score for item in answer.data]
    assert scores == sorted(scores, reverse=True)
    # A regression's output is no probability.
    assert len({round(item.score, 6) for item in answer.data}) == len(CANDIDATES)


def test_ranking_by_another_task_changes_the_order_and_no_score(make: MakeRecommender) -> None:
    click, dwell = (
        make("stu", rank_by=task).recommend(body("stu")).data for task in ("click", "dwell")
    )
    assert [item.index for item in click] != [item.index for item in dwell]
    for one, other in zip(by_place(click), by_place(dwell), strict=True):
        assert one.task_scores == pytest.approx(other.task_scores)


def test_items_of_nvidia_bring_a_logit_per_task_and_are_ranked_by_the_named_one(
    make: MakeRecommender,
) -> None:
    answer = make("nvidia").recommend(body("nvidia", top_k=4))
    assert len(answer.data) == 4
    for item in answer.data:
        assert item.task_scores is not None
        assert list(item.task_scores) == ["click", "like"]
        assert item.score == item.task_scores["like"]


@pytest.mark.parametrize("dialect", ["research", "sasrec"])
def test_items_of_retrieval_models_bring_no_tasks(make: MakeRecommender, dialect: str) -> None:
    recommender = make(dialect)
    for request in (body(dialect), body(dialect, candidates=None)):
        assert {item.task_scores for item in recommender.recommend(request).data} == {None}


@pytest.mark.parametrize(("dialect", "tokens"), [("stu", 2 + 9), ("nvidia", 2 * 9), ("sasrec", 9)])
def test_usage_counts_all_tokens_of_the_context(
    make: MakeRecommender, dialect: str, tokens: int
) -> None:
    usage = make(dialect).recommend(body(dialect)).usage
    assert (usage.history_tokens, usage.candidates) == (tokens, len(CANDIDATES))


def test_candidates_alike_score_alike_and_a_feature_makes_them_differ(
    make: MakeRecommender,
) -> None:
    candidates = {"item_ids": [5, 9, 5, 5], "category": [1, 1, 3, 1]}
    answer = make("stu").recommend(body("stu", candidates=candidates))
    first, _, other, twin = (item.task_scores for item in by_place(answer.data))
    assert first == twin
    assert first != other
    alone = {"item_ids": [5], "category": [3]}
    (only,) = make("stu").recommend(body("stu", candidates=alone)).data
    assert only.task_scores == pytest.approx(other)


def test_candidates_of_a_group_read_one_another_and_are_never_merged(make: MakeRecommender) -> None:
    recommender = make("nvidia", target_group_size=3)
    candidates = {"item_ids": [5, 5, 9, 5]}
    answer = recommender.recommend(body("nvidia", candidates=candidates))
    scores = [item.score for item in by_place(answer.data)]
    # The second reads the first; the fourth is the first of its own group.
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)
    assert scores[0] == pytest.approx(scores[3], abs=1e-5)


def test_excluded_items_are_left_out_of_a_ranking(make: MakeRecommender) -> None:
    request = body("stu", exclude_history=True)
    request["candidates"] = {"item_ids": [request["history"]["item_ids"][0], 0], "category": [1, 1]}
    assert [item.item_id for item in make("stu").recommend(request).data] == [0]


@pytest.mark.parametrize("budget", [2, 3, 7])
@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_chunks_and_micro_batches_change_no_score(
    make: MakeRecommender, dialect: str, budget: int
) -> None:
    """The first two tokens of stu, contextual ones, take no row: a step of them plans none."""
    whole, cut = make(dialect), make(dialect, tokens=budget)
    want, got = (by_place(one.recommend(body(dialect)).data) for one in (whole, cut))
    tokens = 9 * toy_config(dialect).tokens_per_event + len(CANDIDATES)
    assert whole.engine.core.scheduler.stats.steps == 1
    assert cut.engine.core.scheduler.stats.steps >= tokens // budget
    for one, other in zip(want, got, strict=True):
        assert other.score == pytest.approx(one.score, abs=1e-5)
        assert other.task_scores == pytest.approx(one.task_scores, abs=1e-5)


# ---------------------------------------------------------------- refusals


def refusal(recommender: Recommender, request: dict[str, Any]) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        recommender.recommend(request)
    return error.value


@pytest.mark.parametrize("dialect", ["stu", "nvidia"])
def test_retrieval_from_a_ranking_model_is_refused(make: MakeRecommender, dialect: str) -> None:
    error = refusal(make(dialect), body(dialect, candidates=None))
    assert error.param == "candidates"
    assert str(error).startswith("candidates: required")


def test_more_candidates_than_stu_was_made_for_are_refused_with_the_limit(
    make: MakeRecommender,
) -> None:
    recommender = make("stu", max_candidates=7)
    for number in (7, 8):
        candidates = {"item_ids": [1] * number, "category": [0] * number}
        request = body("stu", candidates=candidates)
        if number == 7:
            assert len(recommender.recommend(request).data) == 7
        else:
            error = refusal(recommender, request)
            assert error.param == "candidates.item_ids"
            assert "holds 8 items, must hold 1 to 7" in str(error)


def test_context_too_long_for_a_step_is_refused_where_it_may_not_be_chunked(
    make: MakeRecommender,
) -> None:
    contextual = [{"name": "user_id", "num_rows": 5000}, {"name": "device", "num_rows": 4}]
    fields: dict[str, Any] = {"context": {"user_id": 3, "device": 1}}
    recommender = make("nvidia", tokens=20, contextual=contextual)
    # Two contextual tokens and two for each event.
    assert len(recommender.recommend(body("nvidia", 9, **fields)).data) == len(CANDIDATES)
    error = refusal(recommender, body("nvidia", 10, **fields))
    assert error.param == "history.item_ids"
    assert "22 tokens" in str(error)
    assert "20 tokens (max_num_batched_tokens)" in str(error)


def test_budget_smaller_than_a_group_of_candidates_is_refused(make: MakeRecommender) -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens: must be at least 7"):
        make("nvidia", tokens=6, target_group_size=7)


# ---------------------------------------------------------------- reuse


def test_stu_reuses_kv_of_the_same_history_at_the_same_time_alone(make: MakeRecommender) -> None:
    recommender = make("stu", num_time_buckets=4096)
    asked = body("stu", 9, user="ada", request_time=2 * 10**6)
    first, again = recommender.recommend(asked), recommender.recommend(asked)
    assert (first.usage.cached_tokens, first.usage.reuse_blocked) == (0, "model")
    # Two full blocks of the eleven tokens; nothing hindered the reuse.
    assert (again.usage.cached_tokens, again.usage.reuse_blocked) == (8, None)
    assert [item.task_scores for item in by_place(again.data)] == [
        pytest.approx(item.task_scores) for item in by_place(first.data)
    ]
    later = recommender.recommend({**asked, "request_time": 3 * 10**6})
    assert (later.usage.cached_tokens, later.usage.reuse_blocked) == (0, "model")
    longer = recommender.recommend(body("stu", 10, user="ada", request_time=2 * 10**6))
    assert (longer.usage.cached_tokens, longer.usage.reuse_blocked) == (0, "model")


def test_nvidia_reuses_kv_of_a_returning_user(make: MakeRecommender) -> None:
    recommender = make("nvidia")
    recommender.recommend(body("nvidia", 9, user="ada"))
    longer = body("nvidia", 12, user="ada")
    again = recommender.recommend(longer)
    assert (again.usage.cached_tokens, again.usage.reuse_blocked) == (16, None)
    cold = recommender.recommend({**longer, "user": "bob"})
    assert cold.usage.cached_tokens == 0
    for one, other in zip(by_place(again.data), by_place(cold.data), strict=True):
        assert one.task_scores == pytest.approx(other.task_scores, abs=1e-5)


@pytest.mark.parametrize("layers", [2, 3])
def test_nothing_of_a_context_that_reads_ahead_is_reused(
    make: MakeRecommender, layers: int
) -> None:
    contextual = [{"name": "device", "num_rows": 4}]
    recommender = make("nvidia", contextual=contextual, num_layers=layers)
    asked = body("nvidia", 9, user="ada", context={"device": 1})
    usages = [recommender.recommend(asked).usage for _ in range(2)]
    assert [usage.cached_tokens for usage in usages] == [0, 0]
    assert [usage.reuse_blocked for usage in usages] == ["model", "model"]


@pytest.mark.parametrize("dialect", ["sasrec", "research"])
def test_anchored_window_is_reused_until_it_moves(make: MakeRecommender, dialect: str) -> None:
    """24 events are read; windows begin at multiples of 8, so that of 30 begins at event 8."""
    recommender = make(dialect, anchor_stride=8)

    def ask(total: int, user: str, sent: int | None = None) -> tuple[int, int, str | None]:
        number = total if sent is None else sent
        request = body(dialect, number, first=total - number, user=user)
        request["history"]["start_index"] = total - number
        usage = recommender.recommend(request).usage
        return usage.history_tokens, usage.cached_tokens, usage.reuse_blocked

    assert ask(30, "ada") == (22, 0, "window_shifted")
    assert ask(32, "ada") == (24, 20, None)
    # The client may cut what the model would not read.
    assert ask(32, "ada", sent=26) == (24, 20, None)
    assert ask(33, "ada") == (17, 0, "window_shifted")


# ---------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_scores_in_bfloat16_are_those_in_float32_to_the_second_digit(
    make: MakeRecommender, dialect: str
) -> None:
    exact, rough = (make(dialect, dtype=dtype) for dtype in ("float32", "bfloat16"))
    want, got = (by_place(one.recommend(body(dialect)).data) for one in (exact, rough))
    largest = max(abs(item.score) for item in want)
    for one, other in zip(want, got, strict=True):
        assert other.score == pytest.approx(one.score, abs=0.05 * max(1.0, largest))
    # Rows, K and V take half the bytes.
    assert rough.engine.served.layout.row_bytes * 2 == exact.engine.served.layout.row_bytes
    assert rough.engine.runner.arena.kv.k.element_size() == 2


@pytest.mark.parametrize("dtype", ["float16", "", "bf16"])
def test_other_dtypes_are_refused_by_field_with_the_known_ones(dtype: str) -> None:
    with pytest.raises(ValueError, match=r"^dtype: must be one of float32, bfloat16, not "):
        ExecutorConfig(dtype=dtype)

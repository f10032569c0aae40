"""The engine as a Python object: what callers pass, streams, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helm_engine.clock import SystemClock
from helm_engine.config import ExecutorConfig
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import HelmError, InvalidRequestError, StepFailedError
from helm_engine.protocol import Recommendation
from helm_engine.recommender import Recommender
from model_executor.exceptions import RowsUnavailableError
from tests.toy_models import read_reference, toy_config, toy_engine_config, write_toy_model

HISTORY = {"item_ids": [3, 1, 4], "timestamps": [10, 20, 30]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@pytest.fixture
def recommender(model_dir: Path) -> Iterator[Recommender]:
    """An engine that must be idle and whole afterwards."""
    made = Recommender.from_config(toy_engine_config(model_dir, max_num_seqs=4))
    yield made
    assert not made.engine.core.has_work
    pool = made.engine.core.scheduler.kv.pool
    assert pool.num_held_blocks == 0
    made.engine.core.check_integrity()


def test_tuples_and_arrays_are_taken_for_lists(recommender: Recommender) -> None:
    plain = recommender.recommend({"history": HISTORY})
    for make in (tuple, np.array):
        history = {name: make(values) for name, values in HISTORY.items()}
        assert recommender.recommend({"history": history}).data == plain.data


def test_excluding_every_item_leaves_an_empty_answer(recommender: Recommender) -> None:
    history = {"item_ids": list(range(1, 61)), "timestamps": list(range(60))}
    assert recommender.recommend({"history": history, "exclude_history": True}).data == []
    candidates = {"item_ids": [5, 6]}
    body = {"history": history, "exclude_history": True, "candidates": candidates}
    assert recommender.recommend(body).data == []


def test_top_k_beyond_the_catalogue_returns_all_of_it(
    recommender: Recommender, model_dir: Path
) -> None:
    answer = recommender.recommend({"history": HISTORY, "top_k": 1000})
    want = read_reference(model_dir).scores([3, 1, 4], [10, 20, 30, 30])
    assert [item.item_id for item in answer.data] == (np.argsort(-want) + 1).tolist()


def test_a_batch_raises_its_first_error_after_all_have_ended(recommender: Recommender) -> None:
    bad = {"history": {"item_ids": [0], "timestamps": [1]}}
    with pytest.raises(InvalidRequestError, match=r"history\.item_ids\[0\]"):
        recommender.recommend_batch([{"history": HISTORY}, bad, {"history": HISTORY}])


def test_a_stream_answers_before_it_has_read_everything(recommender: Recommender) -> None:
    read = 0

    def bodies() -> Iterator[dict[str, Any]]:
        nonlocal read
        for _ in range(500):
            read += 1
            yield {"history": HISTORY}

    stream = recommender.stream(bodies())
    assert isinstance(next(stream), Recommendation)
    assert read <= 8
    assert sum(isinstance(answer, Recommendation) for answer in stream) == 499


def test_a_stream_closed_early_leaves_nothing_behind(recommender: Recommender) -> None:
    for _ in range(3):
        stream = recommender.stream({"history": HISTORY} for _ in range(100))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(recommender.recommend_batch([{"history": HISTORY}] * 20)) == 20


def test_a_stream_whose_source_breaks_leaves_nothing_behind(recommender: Recommender) -> None:
    def bodies() -> Iterator[dict[str, Any]]:
        yield {"history": HISTORY}
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(recommender.stream(bodies()))


def test_a_deadline_that_cannot_be_met_is_said(recommender: Recommender) -> None:
    (answer,) = recommender.stream([{"history": HISTORY, "deadline_ms": 1e-6}])
    assert isinstance(answer, HelmError)
    assert answer.status == 504


def test_a_reset_forgets_all_kv(recommender: Recommender) -> None:
    history = {"item_ids": list(range(1, 13)), "timestamps": list(range(12))}
    body = {"user": "u", "history": history}
    recommender.recommend(body)
    assert recommender.recommend(body).usage.cached_tokens == 8
    assert recommender.reset_prefix_cache()
    assert recommender.recommend(body).usage.cached_tokens == 0


class _UnreachableTable:
    """A host tier that is down."""

    num_rows = 61

    def read_rows(self, row_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        raise RowsUnavailableError(f"{len(row_ids)} rows cannot be had")


def test_warm_up_finds_a_host_tier_that_is_down(model_dir: Path) -> None:
    config = toy_engine_config(model_dir)
    candidates_only = replace(config, executor=ExecutorConfig(max_retrieval_matrix_bytes=0))
    with pytest.raises(StepFailedError, match="cannot be had"):
        load_engine(candidates_only, SystemClock(), table=_UnreachableTable())


def test_a_host_table_with_too_few_rows_is_refused(model_dir: Path) -> None:
    table = _UnreachableTable()
    table.num_rows = 60
    with pytest.raises(ValueError, match="60 rows, the model needs 61"):
        load_engine(toy_engine_config(model_dir), SystemClock(), table=table)


def test_warm_up_leaves_no_trace(recommender: Recommender) -> None:
    scheduler = recommender.engine.core.scheduler
    assert scheduler.emb.num_resident == 0
    assert scheduler.stats.steps == 0

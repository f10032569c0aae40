"""What stays on the device, where scores read rows from, and steps whose rows cannot be loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from helm_engine.clock import VirtualClock
from helm_engine.config import EngineConfig, ExecutorConfig
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import HelmError, StepFailedError
from helm_engine.protocol import Recommendation, parse_request
from helm_engine.recommender import Recommender
from helm_engine.request import Request
from model_executor.checkpoint import DENSE_FILE, TABLES_FILE
from model_executor.exceptions import RowsUnavailableError
from model_executor.model_config import ITEM_TABLE
from model_executor.models.research import ResearchHSTU
from tests.toy_models import read_reference, toy_config, toy_engine_config, write_toy_model

ITEMS = [7, 3, 3, 21, 60, 14, 9, 3, 40, 2, 33]
TIMES = [100, 160, 4000, 4001, 9000, 9000, 20_000, 10**6, 10**6 + 5, 10**7, 10**7 + 1]
CANDIDATES = [1, 3, 7, 25, 60]


def body(num_events: int, user: str | None = None, **fields: Any) -> dict[str, Any]:
    history = {"item_ids": ITEMS[:num_events], "timestamps": TIMES[:num_events]}
    request = {"user": user, "history": history, "candidates": {"item_ids": CANDIDATES}}
    return request | fields


def expected_scores(model_dir: Path, num_events: int) -> npt.NDArray[np.float64]:
    """Of the candidates, by the slow reference; the request is made when the last event happens."""
    times = [*TIMES[:num_events], TIMES[num_events - 1]]
    scores = read_reference(model_dir).scores(ITEMS[:num_events], times)
    return scores.take(np.array(CANDIDATES) - 1)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_toy_model(tmp_path / "toy", toy_config())


# ---------------------------------------------------------------- idle memory


class NewStorages:
    """The memory of all tensors that were made after this object was."""

    def __init__(self) -> None:
        gc.collect()
        # Kept alive, so that no new tensor is given the memory of an old one.
        self._old = list(_live_tensors())
        self._old_addresses = {tensor.untyped_storage().data_ptr() for tensor in self._old}

    def num_bytes(self) -> int:
        gc.collect()
        storages = [tensor.untyped_storage() for tensor in _live_tensors()]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for at, size in sizes.items() if at not in self._old_addresses)


def _live_tensors() -> Iterator[torch.Tensor]:
    return (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@pytest.mark.parametrize("max_matrix_bytes", [0, 1 << 20], ids=["no retrieval", "retrieval"])
def test_idle_engine_holds_weights_pages_and_staging_alone(
    model_dir: Path, max_matrix_bytes: int
) -> None:
    executor = ExecutorConfig(max_retrieval_matrix_bytes=max_matrix_bytes)
    new = NewStorages()
    recommender = Recommender.from_config(
        replace(toy_engine_config(model_dir, num_pages=12), executor=executor)
    )
    engine = recommender.engine
    pool = (
        engine.served.layout.num_pages * engine.served.layout.page_bytes
        + engine.served.layout.staging_bytes
    )
    weights = sum(tensor.nbytes for tensor in load_file(model_dir / DENSE_FILE).values())
    time_edges = 64 * 8
    matrix = 60 * 12 * 4 if max_matrix_bytes else 0
    assert new.num_bytes() == pool + weights + time_edges + matrix
    assert engine.runner.memory.total == new.num_bytes()


def test_serving_leaves_nothing_behind_on_the_device(model_dir: Path) -> None:
    new = NewStorages()
    recommender = Recommender.from_config(toy_engine_config(model_dir, num_pages=12))
    before = new.num_bytes()
    recommender.recommend_batch([body(n, f"user {n}") for n in range(1, 11)])
    recommender.recommend_batch([body(n, candidates=None) for n in range(1, 11)])
    assert new.num_bytes() == before
    recommender.engine.core.check_integrity()


def test_ledger_splits_the_pool_into_pages_and_staging(model_dir: Path) -> None:
    config = toy_engine_config(model_dir, num_pages=12, max_num_batched_tokens=50)
    memory = Recommender.from_config(config).engine.runner.memory
    # A block of 4 tokens takes 4 * 3 layers * 2 heads * (4 + 6) floats, or 960 bytes.
    assert (memory.pages, memory.staging) == (12 * 1024, 50 * 48)
    assert memory.pages + memory.staging == config.pool.pool_bytes


# ---------------------------------------------------------------- where scores come from


def by_item(answer: Recommendation) -> dict[int, float]:
    return {item.item_id: item.score for item in answer.data}


def test_retrieval_matrix_plays_no_part_in_candidate_scores(model_dir: Path) -> None:
    recommender = Recommender.from_config(toy_engine_config(model_dir))
    head = recommender.engine.runner.retrieval_head
    assert head is not None
    head.matrix.fill_(torch.nan)
    answer = by_item(recommender.recommend(body(9)))
    got = [answer[item] for item in CANDIDATES]
    np.testing.assert_allclose(got, expected_scores(model_dir, 9), rtol=1e-4, atol=1e-5)
    recommender.engine.core.check_integrity()


@pytest.mark.parametrize("fields", [{}, {"candidates": None}], ids=["candidates", "retrieval"])
def test_user_that_is_not_a_number_is_an_error_and_no_answer(
    model_dir: Path, fields: dict[str, Any]
) -> None:
    recommender = Recommender.from_config(toy_engine_config(model_dir))
    model = recommender.engine.runner.model
    assert isinstance(model, ResearchHSTU)
    model.position_embedding.fill_(torch.nan)
    with pytest.raises(HelmError, match="not a number"):
        recommender.recommend(body(9, **fields))
    recommender.engine.core.check_integrity()


@pytest.mark.parametrize("emb_fraction", [0.0, 0.25, 1.0])
def test_scores_do_not_depend_on_the_share_of_rows_in_the_pool(
    model_dir: Path, emb_fraction: float
) -> None:
    recommender = Recommender.from_config(toy_engine_config(model_dir, emb_fraction=emb_fraction))
    for _ in range(2):  # The second time, rows that were admitted are hits.
        answer = by_item(recommender.recommend(body(9)))
        got = [answer[item] for item in CANDIDATES]
        np.testing.assert_allclose(got, expected_scores(model_dir, 9), rtol=1e-4, atol=1e-5)
        recommender.engine.core.check_integrity()


# ---------------------------------------------------------------- a host tier that fails


class FlakyStore:
    """A host tier in memory that is down while `is_down`."""

    def __init__(self, table: npt.NDArray[np.float32]) -> None:
        self.table = table
        self.is_down = False

    @property
    def num_rows(self) -> int:
        return len(self.table)

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if self.is_down:
            raise RowsUnavailableError("the host tier is down")
        return self.table[row_ids]


class FlakyEngine:
    """An engine over a flaky store, stepped by hand."""

    def __init__(self, config: EngineConfig) -> None:
        self.store = FlakyStore(load_file(config.model_dir / TABLES_FILE)[ITEM_TABLE])
        engine = load_engine(config, VirtualClock(), table=self.store)
        self.core, self._processor = engine.core, engine.processor
        self._num_requests = 0

    def submit(self, num_events: int, user: str | None = None) -> Request:
        self._num_requests += 1
        prepared = self._processor.process(
            parse_request(body(num_events, user)), f"request-{self._num_requests}", 0.0
        )
        self.core.add_request(prepared.request)
        return prepared.request

    def step_while_down(self) -> list[Request]:
        self.store.is_down = True
        ended = self.core.step()
        self.store.is_down = False
        self.core.check_integrity()
        return ended

    def run(self) -> None:
        while self.core.has_work:
            self.core.step()
            self.core.check_integrity()


@pytest.fixture
def engine(model_dir: Path) -> Iterator[FlakyEngine]:
    """Takes 12 tokens in a step; its books must add up, and no block be held, when a test ends."""
    config = toy_engine_config(model_dir, max_num_batched_tokens=12)
    engine = FlakyEngine(config)
    yield engine
    engine.core.check_integrity()
    assert engine.core.scheduler.kv.pool.usage == 0.0


def assert_scores_are_right(request: Request, model_dir: Path, num_events: int) -> None:
    assert request.error is None
    # The engine keeps candidates in ascending order, as CANDIDATES are.
    want = expected_scores(model_dir, num_events)
    assert request.scores is not None
    np.testing.assert_allclose(request.scores[:, 0], want, rtol=1e-4, atol=1e-5)


def test_all_requests_of_a_step_without_rows_fail_by_name(engine: FlakyEngine) -> None:
    requests = [engine.submit(2), engine.submit(3)]
    assert engine.step_while_down() == requests
    for request in requests:
        assert isinstance(request.error, StepFailedError)
        assert "the host tier is down" in str(request.error)


def test_request_that_waited_during_a_failed_step_gets_its_scores(
    engine: FlakyEngine, model_dir: Path
) -> None:
    failing, waiting = engine.submit(11), engine.submit(4)
    assert engine.step_while_down() == [failing]
    engine.run()
    assert_scores_are_right(waiting, model_dir, 4)


def test_rows_of_a_failed_step_are_not_taken_for_resident(
    engine: FlakyEngine, model_dir: Path
) -> None:
    engine.submit(6)
    engine.step_while_down()
    again = engine.submit(6)
    engine.run()
    assert again.rows_resident == 0
    assert_scores_are_right(again, model_dir, 6)


def test_rows_that_were_resident_before_a_failed_step_still_are(
    engine: FlakyEngine, model_dir: Path
) -> None:
    engine.submit(6)
    engine.run()
    engine.submit(7)
    engine.step_while_down()
    again = engine.submit(6)
    engine.run()
    assert again.rows_resident == again.rows_requested
    assert_scores_are_right(again, model_dir, 6)


def test_kv_computed_before_a_failed_step_serves_the_users_next_request(
    engine: FlakyEngine, model_dir: Path
) -> None:
    # Six tokens of the first step are the other request's, so that only six rows are computed.
    engine.submit(1)
    engine.submit(11, user="ada")
    engine.core.step()
    engine.step_while_down()
    again = engine.submit(11, user="ada")
    engine.run()
    assert again.cached_tokens == 4
    assert_scores_are_right(again, model_dir, 11)


def test_outage_of_many_steps_leaks_nothing(engine: FlakyEngine, model_dir: Path) -> None:
    for number in range(30):
        engine.submit(1 + number % 11, user=f"user {number % 3}")
        engine.step_while_down()
    after = engine.submit(11)
    engine.run()
    assert_scores_are_right(after, model_dir, 11)

"""Retrieval over the whole catalogue against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from helm_engine.recommender import Recommender
from model_executor.exceptions import ModelDirectoryError
from model_executor.host_store import MemoryMappedTables
from model_executor.model_config import ResearchConfig
from model_executor.models.heads import RetrievalHead
from model_executor.models.research import ResearchHSTU
from model_executor.step import Int64Array, Retrieval
from tests.toy_models import read_reference, toy_config, toy_engine_config, write_toy_model

NUM_ITEMS = 60
DIM = 12

Table = npt.NDArray[np.float32]


def random_table(seed: int = 0) -> Table:
    table = np.random.default_rng(seed).standard_normal((NUM_ITEMS + 1, DIM)).astype(np.float32)
    table[0] = 1e6  # The padding row would win every search that it took part in.
    return table


def random_users(number: int) -> Tensor:
    users = torch.randn(number, DIM, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(users)


def make_head(table: Table, max_bytes: int = 1 << 23) -> RetrievalHead:
    config = toy_config(num_items=len(table) - 1)
    assert isinstance(config, ResearchConfig)
    store = MemoryMappedTables([table])
    return RetrievalHead(ResearchHSTU(config), store, torch.device("cpu"), max_bytes)


def retrieval(top_k: int, excluded: list[int] | None = None) -> Retrieval:
    return Retrieval(top_k, np.array(excluded or [], dtype=np.int64))


def search(
    table: Table, users: Tensor, task: Retrieval
) -> list[tuple[Int64Array, npt.NDArray[np.float32]]]:
    return make_head(table).search(users, [task] * len(users)).results()


def brute_force(table: Table, user: Tensor, task: Retrieval) -> tuple[list[int], list[float]]:
    """Every item's score, one by one; best first, then by id."""
    scored = []
    for item in range(1, len(table)):
        if item not in task.excluded_ids:
            row = table[item].astype(np.float64)
            length = max(1e-6, float(np.sqrt((row * row).sum())))
            scored.append((-float(row @ user.numpy().astype(np.float64)) / length, item))
    best = sorted(scored)[: task.top_k]
    return [item for _, item in best], [-score for score, _ in best]


@pytest.mark.parametrize("top_k", [1, 7, NUM_ITEMS])
def test_best_items_are_those_of_brute_force(top_k: int) -> None:
    table, users = random_table(), random_users(5)
    tasks = [retrieval(top_k)] * 5
    for user, task, (ids, scores) in zip(
        users, tasks, make_head(table).search(users, tasks).results(), strict=True
    ):
        want_ids, want_scores = brute_force(table, user, task)
        assert ids.tolist() == want_ids
        np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-6)


def test_users_of_one_batch_each_get_what_they_asked_for() -> None:
    table, users = random_table(), random_users(3)
    tasks = [retrieval(3), retrieval(10, [1, 2, 3, 60]), retrieval(1, [*range(2, 61)])]
    found = make_head(table).search(users, tasks).results()
    for user, task, (ids, _) in zip(users, tasks, found, strict=True):
        assert ids.tolist() == brute_force(table, user, task)[0]


def test_large_catalogue_and_many_users_are_searched_to_their_ends() -> None:
    # More items than are normalised at once, more users than are scored at once.
    num_items, num_users = 70_000, 250
    table = np.random.default_rng(0).standard_normal((num_items + 1, DIM)).astype(np.float32)
    users = random_users(num_users)
    planted = [num_items - 280 * place for place in range(num_users)]
    table[planted] = 5.0 * users.numpy()
    found = make_head(table).search(users, [retrieval(1)] * num_users).results()
    assert [ids.tolist() for ids, _ in found] == [[item] for item in planted]


def test_catalogue_smaller_than_asked_for_is_returned_whole() -> None:
    ((ids, _),) = search(random_table(), random_users(1), retrieval(1000, [5]))
    assert sorted(ids.tolist()) == [item for item in range(1, 61) if item != 5]


def test_nothing_is_found_where_everything_is_excluded() -> None:
    ((ids, scores),) = search(random_table(), random_users(1), retrieval(4, [*range(1, 61)]))
    assert (ids.tolist(), scores.tolist()) == ([], [])


def test_item_without_a_direction_scores_zero() -> None:
    table = random_table()
    table[9] = 0.0
    ((ids, scores),) = search(table, random_users(1), retrieval(NUM_ITEMS))
    assert scores[ids.tolist().index(9)] == 0.0


def test_items_with_equal_scores_come_in_order_of_their_ids() -> None:
    # Of unit vectors along one axis, so that no order of summation rounds the scores apart.
    table, user = random_table(), torch.eye(DIM)[:1]
    table[[50, 4, 23]] = 3.0 * np.eye(DIM, dtype=np.float32)[0]
    ((ids, scores),) = search(table, user, retrieval(NUM_ITEMS))
    assert ids[:3].tolist() == [4, 23, 50]
    assert scores[:3].tolist() == [1.0, 1.0, 1.0]


def test_of_items_with_equal_scores_those_with_the_lowest_ids_are_found() -> None:
    table = random_table()
    table[1:] = 0.0
    ((ids, _),) = search(table, random_users(1), retrieval(5))
    assert ids.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_ties", [20, 33, 55])
def test_ties_beyond_the_items_asked_for_are_found_however_many(num_ties: int) -> None:
    # Of 60 items 10 + 32 are looked at; the ties are of the 5th place and lie anywhere.
    table, user = random_table(), torch.eye(DIM)[:1]
    table[1:, 0] = -1.0
    axis = np.eye(DIM, dtype=np.float32)[0]
    order = np.random.default_rng(0).permutation(np.arange(1, 61))
    best, tied = order[:4], order[4 : 4 + num_ties]
    table[tied] = axis
    table[best] = axis
    head = make_head(table)
    head.matrix[best - 1] *= 2.0
    ((ids, scores),) = head.search(user, [retrieval(10)]).results()
    assert ids.tolist() == [*sorted(best), *sorted(tied)[:6]]
    assert scores.tolist() == [2.0] * 4 + [1.0] * 6


def test_a_score_that_is_no_number_is_reported() -> None:
    head = make_head(random_table())
    head.matrix[8] = torch.nan
    ((ids, scores),) = head.search(random_users(1), [retrieval(10)]).results()
    assert ids[-1] == 9 and np.isnan(scores[-1])


def test_matrix_of_exactly_the_limit_is_built() -> None:
    assert make_head(random_table(), NUM_ITEMS * DIM * 4).matrix.shape == (NUM_ITEMS, DIM)


def test_matrix_above_the_limit_is_refused_with_the_bytes_needed() -> None:
    with pytest.raises(ModelDirectoryError, match=r"max_retrieval_matrix_bytes: .*2880.*2879"):
        make_head(random_table(), NUM_ITEMS * DIM * 4 - 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_item_that_is_not_finite_is_refused_with_its_row(value: float) -> None:
    table = random_table()
    table[41, 3] = value
    with pytest.raises(ModelDirectoryError, match=r"row 41 "):
        make_head(table)


def test_served_retrieval_finds_the_best_items_of_the_slow_reference(tmp_path: Path) -> None:
    model_dir = write_toy_model(tmp_path / "toy", toy_config())
    recommender = Recommender.from_config(toy_engine_config(model_dir))
    history = {"item_ids": [5, 9, 31, 5], "timestamps": [10, 20, 500, 9000]}
    answer = recommender.recommend({"history": history, "top_k": 8, "exclude_history": True})
    scores = read_reference(model_dir).scores([5, 9, 31, 5], [10, 20, 500, 9000, 9000])
    allowed = [item for item in range(1, 61) if item not in (5, 9, 31)]
    want = sorted(allowed, key=lambda item: -scores[item - 1])[:8]
    assert [item.item_id for item in answer.data] == want
    got = [item.score for item in answer.data]
    np.testing.assert_allclose(got, scores[np.array(want) - 1], rtol=1e-4, atol=1e-5)
    recommender.engine.core.check_integrity()

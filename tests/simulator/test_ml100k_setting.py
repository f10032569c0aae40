"""The setting `ml100k`: what is real in it stays real, and whoever lacks the data is told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helm_engine.datasets.ml100k import NUM_ITEMS, DatasetError, load_local_ml100k
from helm_engine.entrypoints.cli import app
from helm_engine.simulator.events.law import Asked, Drawn
from helm_engine.simulator.events.ml100k import MovieLensLaw, ring_of, visit_sizes
from helm_engine.simulator.trace import make_trace
from helm_engine.simulator.workloads import ML100K_ITEMS
from tests.benchmarks.invented_ratings import invented_ratings
from tests.helm_engine.test_ml100k import whole_data_set
from tests.simulator.small import regime, workload

USERS = 30
DATA = invented_ratings(USERS)
OVER: dict[str, Any] = {
    "data": "ml100k",
    "num_items": ML100K_ITEMS,
    "num_categories": None,
    "categories_per_user": None,
}


def drawn(people: int, length: int, candidates: int = 1, new_events: int = 1) -> Drawn:
    ones = np.ones(people, dtype=np.int64)
    asked = Asked(
        np.arange(people), length * ones, 0 * ones, candidates * ones, new_events * ones, 0 * ones
    )
    law = MovieLensLaw(DATA, [regime(item_zipf=None)])
    return law.draw(asked, np.random.default_rng(5), (1, 2))


# ---------------------------------------------------------------- what is real


def test_copies_and_items_are_as_popular_as_the_real_ones() -> None:
    people = 200_000
    items = drawn(people, length=2).first_histories
    real = np.bincount(DATA.item_ids - 1, minlength=NUM_ITEMS) / DATA.num_events
    for found in (items // NUM_ITEMS, items % NUM_ITEMS):
        shares = np.bincount(found, minlength=NUM_ITEMS) / len(items)
        # One person's events are met together: as spread as half of the draws, at least.
        assert np.abs(shares - real).max() < 5 * (real.max() / people) ** 0.5
        assert np.corrcoef(shares, real)[0, 1] > 0.95


def test_the_other_candidates_follow_the_same_popularity() -> None:
    items = drawn(people=2000, length=1, candidates=101).shown.reshape(2000, 101)[:, 1:]
    real = np.bincount(DATA.item_ids - 1, minlength=NUM_ITEMS) / DATA.num_events
    for found in (items // NUM_ITEMS, items % NUM_ITEMS):
        shares = np.bincount(found.ravel(), minlength=NUM_ITEMS) / items.size
        assert np.abs(shares - real).max() < 5 * (real.max() / items.size) ** 0.5


def test_a_history_walks_through_each_copy_as_a_real_user_did() -> None:
    whole = [(DATA.history(user)[0] - 1).tolist() for user in range(USERS)]
    ring = [item for user in ring_of(DATA).tolist() for item in whole[user]]
    follows = set(pairwise([*ring, ring[0]]))
    for history in drawn(people=40, length=3000).first_histories.reshape(40, 3000).tolist():
        copies = [item // NUM_ITEMS for item in history]
        inner = [item % NUM_ITEMS for item in history]
        (user,) = [one for one in whole if set(one) == set(inner)]
        changes = [place for place in range(1, 3000) if copies[place] != copies[place - 1]]
        begin = user.index(inner[0])
        assert inner == [user[(begin + place) % len(user)] for place in range(3000)]
        # A copy is left after its last item, for that which a real user went on to.
        assert {inner[place] for place in changes} == {user[0]}
        assert all(pair in follows for pair in pairwise([copies[0], *[copies[p] for p in changes]]))


def test_new_events_go_on_where_the_history_ends() -> None:
    whole = drawn(people=20, length=60).first_histories.reshape(20, 60)
    part = drawn(people=20, length=50, candidates=12, new_events=10)
    np.testing.assert_array_equal(part.first_histories.reshape(20, 50), whole[:, :50])
    np.testing.assert_array_equal(part.shown.reshape(20, 12)[:, :10], whole[:, 50:])


def test_visits_bring_as_many_events_as_users_rate_within_a_minute() -> None:
    sizes = visit_sizes(DATA)
    assert sizes.sum() == DATA.num_events
    assert 1 == sizes.min() < sizes.max()
    law = MovieLensLaw(DATA, [regime(item_zipf=None, new_events=20, candidates=1000)])
    events = law.new_events(np.zeros(50_000, dtype=np.int64), np.random.default_rng(1))
    assert events.mean() == pytest.approx(20, rel=0.02)
    assert events.std() / events.mean() == pytest.approx(sizes.std() / sizes.mean(), rel=0.05)


def test_neighbours_in_the_ring_are_similar() -> None:
    ring = ring_of(DATA)
    assert sorted(ring.tolist()) == list(range(USERS))
    liked = [set(DATA.history(user)[0].tolist()) for user in range(USERS)]

    def similar(one: int, other: int) -> float:
        both = len(liked[one] & liked[other])
        found: float = both / (len(liked[one]) * len(liked[other])) ** 0.5
        return found

    for place, user in enumerate(ring.tolist()[:-1]):
        left = ring[place + 1 :].tolist()
        best = max(similar(user, other) for other in left)
        assert similar(user, left[0]) == pytest.approx(best, rel=1e-5)


# ---------------------------------------------------------------- the user's own copy


def test_without_the_data_the_error_says_where_to_get_it_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELM_CACHE", str(tmp_path))
    with pytest.raises(DatasetError, match=r"https://grouplens\.org.*u\.data") as error:
        load_local_ml100k()
    assert str(tmp_path / "ml-100k" / "u.data") in str(error.value)
    wanted = ["simulate", "--workload", "burst", "--setting", "ml100k", "--emb-fraction", "0.3"]
    done = CliRunner().invoke(app, wanted)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("helm-engine: error: MovieLens-100K: there is no ")


def test_a_workload_runs_over_the_users_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELM_CACHE", str(tmp_path))
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "u.data").write_text(whole_data_set(), encoding="utf-8")
    laws = workload(regime(item_zipf=None), **OVER)
    trace, same, other = (make_trace(laws, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(trace.events, same.events)
    np.testing.assert_array_equal(trace.candidates, same.candidates)
    assert len(other.events) != len(trace.events)
    assert 0 <= trace.events.min() < trace.events.max() < ML100K_ITEMS
    returning = [number for number in range(1, len(trace)) if trace.lengths[number] > 150]
    assert returning

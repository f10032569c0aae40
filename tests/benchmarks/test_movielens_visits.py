"""Visits made of a data set with the form of MovieLens-100K and invented events."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from typing import Any

from benchmarks.movielens_visits import movielens_visits
from benchmarks.returning_visits import NEW_EVENTS, Asked
from tests.benchmarks.invented_ratings import invented_ratings

DATASET = invented_ratings(num_users=30)
SEATS = 8


def visits(number: int, seed: int = 1) -> list[Asked]:
    return list(islice(movielens_visits(DATASET, SEATS, seed), number))


def by_user(asked: list[Asked]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in asked:
        body = json.loads(one.with_user)
        found.setdefault(body["user"], []).append(body)
    return found


def test_each_visit_brings_ten_events_more_than_the_last() -> None:
    for stay in by_user(visits(600)).values():
        for before, body in pairwise(stay):
            for name in ("item_ids", "timestamps"):
                old, new = before["history"][name], body["history"][name]
                assert len(new) == len(old) + NEW_EVENTS
                assert new[: len(old)] == old
            assert before["request_time"] <= body["history"]["timestamps"][len(old)]


def test_a_visit_returns_unless_it_is_the_first_of_a_stay() -> None:
    seen: set[str] = set()
    for one in visits(600):
        user = json.loads(one.with_user)["user"]
        assert one.returning == (user in seen)
        seen.add(user)
    assert len(seen) > 30  # More than there are users: who comes round again is somebody else.


def test_nobody_comes_twice_in_a_round() -> None:
    asked = visits(20 * SEATS)
    for first in range(0, len(asked), SEATS):
        assert len(by_user(asked[first : first + SEATS])) == SEATS


def test_stays_begin_anywhere_and_then_with_the_first_events() -> None:
    stays = list(by_user(visits(600)).values())
    lengths = [len(stay[0]["history"]["item_ids"]) for stay in stays]
    assert max(lengths[:SEATS]) > NEW_EVENTS
    assert set(lengths[SEATS:]) == {NEW_EVENTS}


def test_both_bodies_ask_the_same() -> None:
    for one in visits(50):
        body = json.loads(one.with_user)
        assert one.history == len(body["history"]["item_ids"])
        del body["user"]
        assert json.loads(one.without_user) == body


def test_the_seed_decides() -> None:
    assert visits(100, seed=3) == visits(100, seed=3)
    assert visits(100, seed=3) != visits(100, seed=4)

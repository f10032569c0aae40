"""Returning users: what a visit brings, who comes, and that the stream is always the same."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helm_engine.datasets.returning_users import ReturningUsers, ReturningUsersConfig, Visit

COLUMNS = ("item_ids", "category_ids", "ratings", "actions", "timestamps")


def stream(**changes: Any) -> ReturningUsers:
    """A stream of 20 seats, with histories of 30 to 60 events and 12 candidates per visit."""
    values: dict[str, Any] = {
        "num_users": 20,
        "num_items": 4_000,
        "num_categories": 8,
        "first_history": 30,
        "new_events": 3,
        "max_history": 60,
        "num_candidates": 12,
        "recent_users": 4.0,
    }
    return ReturningUsers(ReturningUsersConfig(**(values | changes)))


def columns(visit: Visit) -> list[list[Any]]:
    return [getattr(visit.history, name).tolist() for name in COLUMNS]


def fingerprint(visit: Visit) -> tuple[Any, ...]:
    return (
        visit.user,
        visit.visit_index,
        visit.num_new,
        visit.request_time,
        columns(visit),
        visit.candidates.item_ids.tolist(),
        visit.candidates.category_ids.tolist(),
        visit.candidates.ratings.tolist(),
    )


# ---------------------------------------------------------------- what a visit brings


def test_defaults_bring_ten_new_events_after_a_history_of_640() -> None:
    first: dict[int, Visit] = {}
    for visit in ReturningUsers(ReturningUsersConfig()).visits(200):
        before = first.setdefault(visit.user, visit)
        assert len(visit.history) == 640 + 10 * visit.visit_index
        assert len(visit.candidates) == 256
        assert visit.num_new == (10 if visit.visit_index else 640)
        assert np.array_equal(visit.history.item_ids[:640], before.history.item_ids)
    assert len(first) < 100


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    num_users=st.integers(1, 12),
    first_history=st.integers(1, 40),
    first_history_sd=st.sampled_from([0.0, 8.0]),
    new_events=st.integers(1, 12),
    max_history=st.integers(40, 70),
    p_return=st.sampled_from([0.0, 0.5, 1.0]),
    recent_users=st.sampled_from([1.0, 3.0]),
    num_train_steps=st.sampled_from([0, 3, 90]),
    num_items=st.sampled_from([8, 4_000]),
    item_zipf=st.sampled_from([None, 1.0]),
    timestamps=st.sampled_from(["ones", "seconds"]),
)
def test_each_history_is_the_last_one_and_the_new_events(**changes: Any) -> None:
    users = stream(**changes)
    last: dict[int, Visit] = {}
    for visit in users.visits(80):
        history = visit.history
        assert len(history) <= users.config.max_history
        assert (np.diff(history.timestamps) >= 0).all()
        assert visit.request_time >= history.timestamps[-1]
        items_per_category = users.config.items_per_category
        assert np.array_equal(history.category_ids, history.item_ids // items_per_category)
        assert len(visit.candidates) == users.config.num_candidates
        before = last.get(visit.user)
        if before is None:
            assert visit.visit_index == 0
            assert visit.num_new == len(history)
        else:
            assert visit.visit_index == before.visit_index + 1
            assert visit.num_new == users.config.new_events
            assert len(history) == len(before.history) + visit.num_new
            for mine, earlier in zip(columns(visit), columns(before), strict=True):
                assert mine[: len(earlier)] == earlier
            # The user chose among what was shown the last time.
            chosen = Counter(history.item_ids[-visit.num_new :].tolist())
            assert chosen <= Counter(before.candidates.item_ids.tolist())
            assert history.timestamps[-visit.num_new] >= before.request_time
        last[visit.user] = visit


def test_catalogue_grows_over_the_first_history_and_the_first_ten_visits() -> None:
    # 500 items per category, of which 5 appear in each of the 100 steps.
    config = {"first_history": 640, "max_history": 700, "num_candidates": 100, "num_users": 100}
    newest: dict[int, int] = {}
    for visit in stream(**config).visits(600):
        offsets = visit.history.item_ids % 500
        assert offsets[:50].max() < 5
        assert offsets[-100:].max() > 400 or visit.visit_index
        latest = int((visit.candidates.item_ids % 500).max())
        newest[visit.visit_index] = max(latest, newest.get(visit.visit_index, 0))
    assert len(newest) > 12
    for visit_index, latest in newest.items():
        assert latest < min(500, 455 + 5 * visit_index)
        assert visit_index > 8 or latest >= 450 + 5 * visit_index
        assert visit_index < 9 or latest > 480


def test_visits_that_were_kept_do_not_change() -> None:
    kept = list(stream().visits(300))
    assert [fingerprint(visit) for visit in kept] == [fingerprint(v) for v in stream().visits(300)]
    with pytest.raises(ValueError, match="read-only"):
        kept[0].history.item_ids[0] = 1


def test_first_histories_spread_between_users() -> None:
    users = stream(num_users=100_000, p_return=0.0, first_history_sd=5.0)
    lengths = [visit.num_new for visit in users.visits(400) if visit.visit_index == 0]
    assert np.mean(lengths) == pytest.approx(30, abs=4 * 5 / math.sqrt(len(lengths)))
    assert np.std(lengths) == pytest.approx(5, rel=4 / math.sqrt(2 * len(lengths)))


def test_users_without_room_for_more_are_followed_by_new_ones() -> None:
    seen: dict[int, list[int]] = {}
    for visit in stream(num_users=3).visits(400):
        seen.setdefault(visit.user, []).append(visit.visit_index)
    # 30, 33, ... 60 events: eleven visits, and then the id does not come again.
    assert max(len(visits) for visits in seen.values()) == 11
    assert all(visits == list(range(len(visits))) for visits in seen.values())
    assert sum(len(visits) < 11 for visits in seen.values()) <= 3
    for seat in range(3):
        ids = [user for user in seen if user % 3 == seat]
        assert ids == list(range(seat, seat + 3 * len(ids), 3))
        assert len(ids) > 1
    first = [v.history.item_ids.tolist() for v in stream(num_users=3).visits(400) if v.num_new > 3]
    assert len({tuple(items) for items in first}) == len(seen)


def test_user_who_has_no_room_at_all_comes_once() -> None:
    users = [visit.user for visit in stream(first_history=60, num_users=2).visits(50)]
    assert len(set(users)) == 50


# ---------------------------------------------------------------- who comes


def test_stream_is_the_same_in_every_call_and_ends_only_on_request() -> None:
    users = stream()
    endless = users.visits()
    assert [fingerprint(v) for v in islice(endless, 60)] == [
        fingerprint(v) for v in users.visits(60)
    ]
    other = [visit.user for visit in stream(seed=1).visits(60)]
    assert other != [visit.user for visit in users.visits(60)]


def test_events_of_a_user_do_not_depend_on_who_else_comes() -> None:
    def by_user(users: ReturningUsers) -> dict[tuple[int, int], tuple[Any, ...]]:
        return {(v.user, v.visit_index): fingerprint(v) for v in users.visits(200)}

    one, other = by_user(stream(p_return=0.9)), by_user(stream(p_return=0.1, recent_users=9.0))
    shared = one.keys() & other.keys()
    assert len(shared) > 20
    assert all(one[key] == other[key] for key in shared)


def cheap(**changes: Any) -> ReturningUsers:
    """Visits of few events, so that the order of many can be looked at."""
    small = {"first_history": 1, "new_events": 1, "num_candidates": 1, "max_history": 5_000}
    return stream(**(small | {"num_users": 1_000_000} | changes))


def recency_ranks(users: ReturningUsers, num_visits: int) -> list[int]:
    """By brute force: how many distinct users came since each user's last visit, plus one."""
    order: list[int] = []
    ranks = []
    for visit in users.visits(num_visits):
        if visit.user in order:
            place = order.index(visit.user)
            ranks.append(len(order) - place)
            del order[place]
        order.append(visit.user)
    return ranks


@pytest.mark.parametrize("mean_rank", [1.5, 6.0])
def test_recency_ranks_are_geometric(mean_rank: float) -> None:
    # A seat chosen among so many is a new one, so those who come again are those who return.
    num_visits = 3_000
    ranks = recency_ranks(cheap(p_return=0.8, recent_users=mean_rank), num_visits)
    share = len(ranks) / num_visits
    assert share == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / num_visits) + 0.001)
    for size in (1, 2, 5, 10):
        hit_ratio = 1 - (1 - 1 / mean_rank) ** size
        error = math.sqrt(hit_ratio * (1 - hit_ratio) / len(ranks))
        found = np.mean([rank <= size for rank in ranks])
        # While fewer than 20 users have come the law is cut off at their number.
        assert found == pytest.approx(hit_ratio, abs=4 * error + 0.005)


def test_seats_chosen_anew_move_up_among_the_recent_ones() -> None:
    num_visits, num_seats, mean_rank = 4_000, 20, 12.0
    users = cheap(p_return=0.5, num_users=num_seats, recent_users=mean_rank)
    ranks = recency_ranks(users, num_visits)[100:]  # all seats are taken by then
    stays = 1 - 1 / mean_rank
    for size in (1, 2, 5, 10):
        returning = (1 - stays**size) / (1 - stays**num_seats)
        hit_ratio = 0.5 * returning + 0.5 * size / num_seats
        error = math.sqrt(hit_ratio * (1 - hit_ratio) / len(ranks))
        assert np.mean([rank <= size for rank in ranks]) == pytest.approx(hit_ratio, abs=4 * error)


def test_latest_user_returns_when_only_that_one_is_recent() -> None:
    users = [visit.user for visit in cheap(p_return=1.0, recent_users=1.0).visits(30)]
    assert len(set(users)) == 1


def test_nobody_is_preferred_without_return() -> None:
    users = Counter(v.user for v in cheap(p_return=0.0, num_users=20).visits(4_000))
    counts = np.array([users[user] for user in range(20)])
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_square - 19) < 4.5 * math.sqrt(2 * 19)


def test_seats_follow_the_zipf_law_spread_over_the_ids() -> None:
    users = cheap(p_return=0.0, num_users=50, user_zipf=1.0)
    visits = Counter(visit.user for visit in users.visits(6_000))
    by_rank = np.array([count for _, count in visits.most_common(20)])
    expected = 6_000 * np.arange(1.0, 21.0) ** -1.0 / (np.arange(1.0, 51.0) ** -1.0).sum()
    # Sorting moves neighbours whose counts are close past one another, hence the wide bound.
    assert (np.abs(by_rank - expected) < 5 * np.sqrt(expected)).all()
    assert [user for user, _ in visits.most_common(5)] != list(range(5))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("num_users", 0, "1"),
        ("user_zipf", -1.0, "0"),
        ("first_history", 61, "60"),
        ("first_history", 0, "1"),
        ("first_history_sd", -1.0, "0"),
        ("new_events", 0, "1"),
        ("new_events", 13, "12"),
        ("max_history", 0, "1"),
        ("num_candidates", 0, "1"),
        ("p_return", 1.1, "1"),
        ("recent_users", 0.5, "1"),
        ("recent_users", math.nan, "1"),
        ("num_items", 0, "1"),
        ("categories_per_user", 9, "8"),
        ("timestamps", "hours", "seconds"),
    ],
)
def test_value_out_of_range_is_refused(field: str, value: Any, limit: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: is .*{limit}"):
        stream(**{field: value})

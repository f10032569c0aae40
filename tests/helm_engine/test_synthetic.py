"""The synthetic workload: published moments, invariants, and what its switches do."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helm_engine.datasets.event_model import FIRST_SECOND, STEP_S
from helm_engine.datasets.synthetic import SyntheticConfig, SyntheticWorkload, UserEvents


def small(**changes: Any) -> SyntheticConfig:
    """A workload of 6 training and 4 inference steps over 4,000 items in 8 categories."""
    values: dict[str, Any] = {
        "num_users": 30,
        "num_items": 4_000,
        "num_categories": 8,
        "num_train_steps": 6,
        "num_inference_steps": 4,
        "events_mean": 12.0,
        "events_sd": 3.0,
        "events_min": 5,
        "num_candidates": 40,
        "num_train_candidates": 4,
    }
    return SyntheticConfig(**(values | changes))


def steps_of_requests(user: UserEvents, config: SyntheticConfig) -> list[int]:
    found = []
    for step in range(config.num_steps):
        try:
            found.append(user.request(step).step)
        except ValueError:
            continue
    return found


def same_user(one: UserEvents, other: UserEvents) -> bool:
    return all(
        np.array_equal(getattr(one.events, name), getattr(other.events, name))
        for name in ("item_ids", "category_ids", "ratings", "actions", "timestamps")
    ) and np.array_equal(
        one.evaluation().candidates.item_ids, other.evaluation().candidates.item_ids
    )


# ---------------------------------------------------------------- published moments

MEASURED_USERS = 200
# A history at step 90 is the base visit and 90 x 0.7 others of 100 +- 25 events. Its spread:
# sqrt(64 x 25**2 + 90 x 0.7 x 0.3 x 100**2) = 479; so a mean over 200 users has an error of 34,
# and the difference of two such means one of 48.
HISTORY_SPREAD = math.sqrt(64 * 25**2 + 90 * 0.21 * 100**2)
MEAN_ERROR = math.sqrt(2 / MEASURED_USERS) * HISTORY_SPREAD


@pytest.fixture(scope="module")
def published() -> list[UserEvents]:
    workload = SyntheticWorkload(SyntheticConfig())
    return [workload.user(user) for user in range(MEASURED_USERS)]


@pytest.mark.parametrize(("step", "measured"), [(90, 6352), (99, 7005)])
def test_history_lengths_are_those_of_the_published_generator(
    published: list[UserEvents], step: int, measured: float
) -> None:
    lengths = [len(user.history(step)) for user in published]
    assert np.mean(lengths) == pytest.approx(measured, abs=4 * MEAN_ERROR)


def test_history_lengths_spread_as_the_published_ones(published: list[UserEvents]) -> None:
    lengths = [len(user.history(90)) for user in published]
    # The extremes of 200 normal draws have an error of 0.4 spreads each.
    assert min(lengths) == pytest.approx(5130, abs=4 * 0.4 * math.sqrt(2) * HISTORY_SPREAD)
    assert max(lengths) == pytest.approx(7586, abs=4 * 0.4 * math.sqrt(2) * HISTORY_SPREAD)
    # A spread of n draws has an error of 1 / sqrt(2 n).
    assert np.std(lengths) == pytest.approx(HISTORY_SPREAD, rel=4 / math.sqrt(2 * MEASURED_USERS))


def test_requests_per_user_over_the_inference_steps(published: list[UserEvents]) -> None:
    config = SyntheticConfig()
    counts = [
        sum(step >= 90 for step in steps_of_requests(user, config)) for user in published[:100]
    ]
    # Ten draws of probability 0.7: spread 1.45; 100 users here, 200 measured.
    assert np.mean(counts) == pytest.approx(7.1, abs=4 * 1.45 * math.sqrt(1 / 100 + 1 / 200))


def test_schedule_of_many_users_has_the_moments_of_its_law() -> None:
    workload = SyntheticWorkload(SyntheticConfig())
    joining = workload.new_events(np.arange(20_000), np.arange(-1, 100))
    assert (joining[:, 0] > 0).all()
    assert joining[joining > 0].min() == 33
    # Rounding and the least of 33 move the mean by less than 0.01.
    error = HISTORY_SPREAD / math.sqrt(20_000)
    assert joining[:, :91].sum(axis=1).mean() == pytest.approx(6400, abs=4 * error)
    present = (joining[:, 1:] > 0).astype(float)
    assert present.mean() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / present.size))
    # Neither steps nor neighbouring users know of each other.
    for first, second in ((present[:, :-1], present[:, 1:]), (present[:-1], present[1:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size)


def test_requests_have_the_published_numbers_of_candidates(published: list[UserEvents]) -> None:
    user = published[0]
    steps = steps_of_requests(user, SyntheticConfig())
    assert {len(user.request(step).candidates) for step in steps if step < 90} == {32}
    assert {len(user.request(step).candidates) for step in steps if step >= 90} == {2048}
    assert len(user.evaluation().candidates) == 32
    assert len(user.evaluation().history) == user.history_length(90)
    assert (user.events.timestamps == 1).all()
    assert len(user.categories) == 4


# ---------------------------------------------------------------- invariants


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    user=st.integers(0, 29),
    num_train_steps=st.integers(0, 8),
    num_inference_steps=st.integers(1, 5),
    categories_per_user=st.integers(1, 8),
    num_items=st.sampled_from([8, 100, 4_000]),
    item_zipf=st.sampled_from([None, 0.0, 1.1]),
    user_zipf=st.sampled_from([None, 0.9]),
    reinforced_by=st.sampled_from(["visit", "event"]),
    timestamps=st.sampled_from(["ones", "seconds"]),
)
def test_later_histories_begin_with_earlier_ones(user: int, **changes: Any) -> None:
    config = small(**changes)
    events = SyntheticWorkload(config).user(user)
    assert (np.diff(events.events.timestamps) >= 0).all()
    assert (np.diff(events.steps) >= 0).all()
    assert (events.events.item_ids >= 0).all()
    assert (events.events.item_ids < config.num_items).all()
    joining = SyntheticWorkload(config).new_events(
        np.array([user]), np.arange(-1, config.num_steps)
    )
    assert len(events.events) == joining.sum()
    for step in steps_of_requests(events, config):
        request = events.request(step)
        length = len(request.history)
        assert length == joining[0, : step + 1].sum()
        assert np.array_equal(request.history.item_ids, events.events.item_ids[:length])
        assert request.request_time >= request.history.timestamps.max()
        # What joins the history in a step and its candidates are parts of one another.
        joined = Counter(events.events.item_ids[events.steps == step].tolist())
        asked = Counter(request.candidates.item_ids.tolist())
        assert asked <= joined if step < config.num_train_steps else joined <= asked


@pytest.mark.parametrize(
    "changes", [{}, {"item_zipf": 1.0, "user_zipf": 1.0, "timestamps": "seconds"}]
)
def test_user_is_a_function_of_seed_and_number(changes: dict[str, Any]) -> None:
    forwards, backwards = SyntheticWorkload(small(**changes)), SyntheticWorkload(small(**changes))
    one = [forwards.user(user) for user in range(30)]
    other = [backwards.user(user) for user in reversed(range(30))][::-1]
    assert all(map(same_user, one, other))
    assert not same_user(one[0], one[1])
    reseeded = SyntheticWorkload(small(seed=1, **changes)).user(0)
    assert not same_user(one[0], reseeded)
    if "user_zipf" not in changes:
        assert same_user(one[7], SyntheticWorkload(small(num_users=1_000_000)).user(7))


def test_requests_of_a_step_are_those_of_its_users_in_shuffled_order() -> None:
    workload = SyntheticWorkload(small(num_users=60))
    requests = list(workload.requests(8))
    users = [request.user for request in requests]
    assert users == workload.users_of(8).tolist()
    assert users != sorted(users)
    present = {u for u in range(60) if 8 in steps_of_requests(workload.user(u), workload.config)}
    assert set(users) == present
    assert all(request.step == 8 for request in requests)
    absent = next(user for user in range(60) if user not in present)
    with pytest.raises(ValueError, match=f"step: user {absent} makes no request in step 8"):
        workload.user(absent).request(8)


def test_history_cannot_be_written() -> None:
    request = SyntheticWorkload(small()).user(0).evaluation()
    with pytest.raises(ValueError, match="read-only"):
        request.history.item_ids[0] = 1


# ---------------------------------------------------------------- switches


def test_seconds_lie_on_the_day_of_their_step_and_move_nothing_else() -> None:
    ones = SyntheticWorkload(small()).user(4)
    seconds = SyntheticWorkload(small(timestamps="seconds")).user(4)
    assert np.array_equal(ones.events.item_ids, seconds.events.item_ids)
    assert np.array_equal(ones.events.ratings, seconds.events.ratings)
    times = seconds.events.timestamps
    assert times.dtype == np.int64
    assert np.array_equal((times - FIRST_SECOND) // STEP_S, seconds.steps + 1)
    assert len(np.unique(times)) > len(times) // 2


def test_session_longer_than_a_day_stays_in_its_step() -> None:
    config = small(timestamps="seconds", events_mean=5_000.0, num_inference_steps=0)
    user = SyntheticWorkload(config).user(0)
    assert np.array_equal((user.events.timestamps - FIRST_SECOND) // STEP_S, user.steps + 1)


def test_user_zipf_keeps_the_mean_and_has_the_exponent() -> None:
    config = small(
        num_users=500,
        num_train_steps=2_000,
        appearance_probability=0.02,
        user_zipf=0.7,
    )
    workload = SyntheticWorkload(config)
    present = workload.new_events(np.arange(500), np.arange(2_000)) > 0
    error = math.sqrt(0.02 * 0.98 / present.size)
    assert present.mean() == pytest.approx(0.02, abs=4 * error)
    visits = present.sum(axis=1)
    by_rank = np.sort(visits)[::-1].astype(float)
    # A straight line through the log-log plot, weighted by counts; the tail is left out because
    # sorting small counts bends it.
    ranks = np.arange(1, 201)
    slope = np.polyfit(np.log(ranks), np.log(by_rank[:200]), 1, w=np.sqrt(by_rank[:200]))[0]
    assert slope == pytest.approx(-0.7, abs=0.06)
    busiest = np.argsort(-visits)[:50]
    assert busiest.mean() == pytest.approx(249.5, abs=4.5 * 144 / math.sqrt(50))


@pytest.mark.parametrize("mean", [0.0, 0.3, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0])
def test_capped_probabilities_have_their_mean(mean: float, exponent: float) -> None:
    config = small(
        num_users=1_000, num_train_steps=400, appearance_probability=mean, user_zipf=exponent
    )
    present = SyntheticWorkload(config).new_events(np.arange(1_000), np.arange(400)) > 0
    error = math.sqrt(mean * (1 - mean) / present.size)
    assert present.mean() == pytest.approx(mean, abs=4.5 * error)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("num_users", 0, "1"),
        ("num_items", 0, "1"),
        ("num_items", 2**32, "2,147,483,648"),
        ("num_categories", 4_001, "4,000"),
        ("categories_per_user", 9, "8"),
        ("categories_per_user", 0, "1"),
        ("num_train_steps", -1, "0"),
        ("num_inference_steps", -1, "0"),
        ("appearance_probability", 1.5, "1"),
        ("appearance_probability", math.nan, "1"),
        ("events_mean", 0.0, "1"),
        ("events_sd", -1.0, "0"),
        ("events_min", 0, "1"),
        ("num_candidates", 4, "5"),
        ("num_train_candidates", 6, "5"),
        ("item_zipf", -0.1, "0"),
        ("user_zipf", math.inf, "10"),
        ("seed", -1, "0"),
        ("reinforced_by", "week", "event"),
        ("timestamps", "hours", "seconds"),
    ],
)
def test_value_out_of_range_is_refused(field: str, value: Any, limit: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: is .*{limit}"):
        small(**{field: value})


def test_combinations_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_inference_steps: is 0, expected 1"):
        small(num_train_steps=0, num_inference_steps=0)
    with pytest.raises(ValueError, match="num_items: is 1000000000, expected 1 to 134,217,728"):
        SyntheticConfig(item_zipf=1.0)


@pytest.mark.parametrize("user", [-1, 30])
def test_unknown_user_is_refused(user: int) -> None:
    with pytest.raises(ValueError, match=f"user: is {user}, expected 0 to 29"):
        SyntheticWorkload(small()).user(user)


@pytest.mark.parametrize("step", [-1, 10])
def test_step_without_requests_is_refused(step: int) -> None:
    workload = SyntheticWorkload(small())
    with pytest.raises(ValueError, match=f"step: is {step}, expected 0 to 9"):
        workload.users_of(step)
    with pytest.raises(ValueError, match=f"makes no request in step {step}"):
        workload.user(0).request(step)

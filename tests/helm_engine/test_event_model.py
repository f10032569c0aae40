"""What synthetic users do: a slow urn, the laws of items, the published values of ratings."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from helm_engine.datasets.event_model import Int64Array
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


# ---------------------------------------------------------------- categories


def urn_played_slowly(
    rng: random.Random, num_visits: int, num_events: int, reinforced_by: str
) -> list[int]:
    """Counts of four categories, event by event."""
    counts = [0] * 4
    for _ in range(num_visits):
        alpha = rng.randint(1, 500)
        before = list(counts)
        for _ in range(num_events):
            seen = counts if reinforced_by == "event" else before
            weights = [alpha / 4 + count for count in seen]
            counts[rng.choices(range(4), weights)[0]] += 1
    return counts


@pytest.mark.parametrize("reinforced_by", ["visit", "event"])
def test_urn_has_the_moments_of_one_played_event_by_event(reinforced_by: str) -> None:
    num_visits, num_events, num_users = 2, 200, 500
    config = small(
        num_users=num_users,
        num_train_steps=num_visits - 1,
        num_inference_steps=0,
        appearance_probability=1.0,
        events_mean=float(num_events),
        events_sd=0.0,
        reinforced_by=reinforced_by,
    )
    workload = SyntheticWorkload(config)
    counts = np.empty((num_users, 4))
    for number in range(num_users):
        user = workload.user(number)
        assert len(user.events) == num_visits * num_events
        counts[number] = (user.events.category_ids == user.categories[:, None]).sum(axis=1)
    ours = counts / (num_visits * num_events)

    rng = random.Random(5)
    slow = {
        law: np.array(
            [urn_played_slowly(rng, num_visits, num_events, law) for _ in range(num_users)]
        )
        / (num_visits * num_events)
        for law in ("visit", "event")
    }
    other = "event" if reinforced_by == "visit" else "visit"
    alike = slow[reinforced_by]
    for mine, expected in (
        (ours.max(axis=1), alike.max(axis=1)),
        ((ours**2).sum(axis=1), (alike**2).sum(axis=1)),
    ):
        error = math.hypot(mine.std(), expected.std()) / math.sqrt(num_users)
        assert mine.mean() == pytest.approx(expected.mean(), abs=4 * error)
    # The test can tell the two urns apart: the largest share is not the same.
    mine, unlike = ours.max(axis=1), slow[other].max(axis=1)
    error = math.hypot(mine.std(), unlike.std()) / math.sqrt(num_users)
    assert abs(mine.mean() - unlike.mean()) > 5 * error
    # All places are alike: each has a quarter of the events.
    assert ours.mean(axis=0) == pytest.approx([0.25] * 4, abs=4.5 * ours.std() / num_users**0.5)


def test_category_follows_from_the_item_id() -> None:
    user = SyntheticWorkload(small(num_items=4_007)).user(3)
    assert np.array_equal(user.events.category_ids, user.events.item_ids // 500)
    assert set(user.events.category_ids.tolist()) <= set(user.categories.tolist())
    assert len(set(user.categories.tolist())) == 4


# ---------------------------------------------------------------- items


@pytest.mark.parametrize("item_zipf", [None, 0.8])
def test_new_items_appear_in_every_step(item_zipf: float | None) -> None:
    config = small(num_users=300, item_zipf=item_zipf)
    workload = SyntheticWorkload(config)
    users = [workload.user(number) for number in range(config.num_users)]
    steps = np.concatenate([user.steps for user in users])
    offsets = np.concatenate([user.events.item_ids % 500 for user in users])
    for step in range(-1, config.num_steps):
        num_appeared = 50 * max(step + 1, 1)
        drawn = offsets[steps == step]
        assert drawn.max() < num_appeared
        newest = np.mean(drawn >= num_appeared - 50)
        if item_zipf is None:
            share = min(1.0, 50 / num_appeared)
            error = math.sqrt(share * (1 - share) / len(drawn))
            assert newest == pytest.approx(share, abs=4 * error)
        else:
            # The ranks are spread by chance: a tenth of the items may have more or less of the
            # events than a tenth, but never next to none of them.
            assert newest > 0.2 * 50 / num_appeared


def test_items_are_uniform_without_zipf() -> None:
    config = small(
        num_categories=1,
        categories_per_user=1,
        num_items=100,
        num_train_steps=0,
        num_inference_steps=1,
        appearance_probability=1.0,
        num_candidates=10_000,
    )
    items = SyntheticWorkload(config).user(0).request(0).candidates.item_ids
    counts = np.bincount(items, minlength=100)
    assert counts.sum() == 10_000
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert abs(chi_square - 99) < 4.5 * math.sqrt(2 * 99)


def popularity(exponent: float | None, num_categories: int = 1) -> Int64Array:
    """How often every item is drawn when the whole catalogue has appeared, [category, item]."""
    config = small(
        num_users=40,
        num_items=1_000 * num_categories,
        num_categories=num_categories,
        categories_per_user=num_categories,
        num_train_steps=0,
        num_inference_steps=1,
        appearance_probability=1.0,
        num_candidates=5_000 * num_categories,
        item_zipf=exponent,
    )
    workload = SyntheticWorkload(config)
    items = [workload.user(user).request(0).candidates.item_ids for user in range(40)]
    counts = np.bincount(np.concatenate(items), minlength=config.num_items)
    return counts.reshape(num_categories, 1_000)


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.3])
def test_zipf_exponent_is_found_again_in_the_counts(exponent: float) -> None:
    counts = np.sort(popularity(exponent)[0])[::-1].astype(float)
    # Maximum likelihood over a grid, with the ranks as they are observed: ties at the tail are
    # sorted, which biases it upwards by 0.01 or 0.02.
    ranks = np.arange(1.0, 1_001.0)
    grid = np.arange(0.3, 1.8, 0.005)
    likelihood = [
        -s * (counts * np.log(ranks)).sum() - counts.sum() * np.log((ranks**-s).sum()) for s in grid
    ]
    assert grid[np.argmax(likelihood)] == pytest.approx(exponent, abs=0.03)


def test_popular_items_are_spread_over_the_ids_and_differ_by_category() -> None:
    counts = popularity(1.0, num_categories=4)
    orders = np.argsort(-counts, axis=1)
    top = orders[:, :100]
    # 100 of 1,000 places without order: mean 499.5, error 288.7 / sqrt(100) x sqrt(0.9).
    assert top.mean(axis=1) == pytest.approx([499.5] * 4, abs=4.5 * 27.4)
    assert ((top < 250).sum(axis=1) > 5).all()
    # Two categories share 10 of their 100 first items by chance, with an error of 2.8.
    for one, other in itertools.combinations(range(4), 2):
        assert len(set(top[one]) & set(top[other])) < 10 + 4.5 * 2.8


# ---------------------------------------------------------------- ratings


def values_of(tier: int, step: int) -> list[tuple[float, float]]:
    """The published user-category values and their probabilities."""
    wave = [math.cos((step + shift) * math.pi / 4) for shift in (0, 2, 4)]
    if tier == 0:
        return [(4.5 + 0.5 * wave[0], 0.8), (4.0 + 0.5 * wave[1], 0.2)]
    top = {1: 4.5, 2: 3.5, 3: 2.5}[tier]
    values = [top - 0.5 * notch + 0.5 * wave[notch] for notch in range(3)]
    return list(zip(values, (0.1, 0.8, 0.1), strict=True))


QUALITIES = [(5, 0.2), (4, 0.25), (3, 0.25), (2, 0.2), (1, 0.1)]


@pytest.fixture(scope="module")
def rated() -> list[UserEvents]:
    workload = SyntheticWorkload(small(num_users=400, num_items=400_000))
    return [workload.user(user) for user in range(400)]


@pytest.mark.parametrize("tier", range(4))
def test_ratings_have_the_published_values_and_probabilities(
    rated: list[UserEvents], tier: int
) -> None:
    chi_square, freedom = 0.0, 0
    for step in range(-1, 10):
        expected: defaultdict[float, float] = defaultdict(float)
        for (value, share), (quality, part) in itertools.product(values_of(tier, step), QUALITIES):
            expected[round((value + quality) / 2, 9)] += share * part
        drawn = Counter(
            round(rating, 9)
            for user in rated
            for rating in user.events.ratings[
                (user.steps == step) & (user.events.category_ids == user.categories[tier])
            ].tolist()
        )
        assert drawn.keys() <= expected.keys()
        total = drawn.total()
        chi_square += sum(
            (drawn[rating] - total * share) ** 2 / (total * share)
            for rating, share in expected.items()
        )
        freedom += len(expected) - 1
    # Normal enough with more than 50 degrees of freedom.
    assert chi_square == pytest.approx(freedom, abs=4.5 * math.sqrt(2 * freedom))


def test_item_has_one_quality_for_all_users_and_steps() -> None:
    # A rating leaves open which qualities it can come from; over many users one is left over.
    config = small(num_items=40, num_categories=4, num_users=100)
    workload = SyntheticWorkload(config)
    qualities: dict[int, set[int]] = {}
    for number in range(config.num_users):
        user = workload.user(number)
        tiers = {category: tier for tier, category in enumerate(user.categories.tolist())}
        events = zip(
            user.events.item_ids.tolist(),
            user.events.category_ids.tolist(),
            user.events.ratings.tolist(),
            user.steps.tolist(),
            strict=True,
        )
        for item, category, rating, step in events:
            possible = {
                quality
                for quality in range(1, 6)
                for value, _ in values_of(tiers[category], step)
                if abs((value + quality) / 2 - rating) < 1e-12
            }
            qualities[item] = qualities.get(item, possible) & possible
    assert len(qualities) == 40
    assert all(qualities.values())


def test_labels_and_actions_follow_from_ratings(rated: list[UserEvents]) -> None:
    events = rated[0].events
    assert set(events.actions.tolist()) <= {1, 2, 4, 8, 16}
    for rating, action in zip(events.ratings.tolist(), events.actions.tolist(), strict=True):
        assert action == 2 ** (math.floor(rating) - 1)
    candidates = rated[0].evaluation().candidates
    assert candidates.labels.tolist() == [r >= 3.5 for r in candidates.ratings.tolist()]

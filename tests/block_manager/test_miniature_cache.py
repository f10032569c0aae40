"""Miniatures of the EMB tenant against the tenant itself at the sizes that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from block_manager.embedding_cache import EmbeddingCache
from block_manager.miniature_cache import MiniatureCaches
from block_manager.spatial_sampling import NOT_SAMPLED, SpatialSample

NUM_ROWS = 20_000
ROWS_PER_PAGE = 16
NUM_PAGES = 500

Steps = list[tuple[np.ndarray, np.ndarray]]


def zipf_steps(number: int, rows_per_step: int, seed: int) -> Steps:
    """Distinct rows of steps and how often each is used; the ids of popular rows are spread."""
    rng = np.random.default_rng(seed)
    weights = rng.permutation(1.0 / np.arange(1, NUM_ROWS + 1))
    draws = rng.choice(NUM_ROWS, size=(number, rows_per_step), p=weights / weights.sum())
    return [np.unique(draw, return_counts=True) for draw in draws]


def hits_of(num_pages: int, steps: Steps) -> int:
    """Hits of the tenant itself."""
    cache = EmbeddingCache(np.arange(num_pages), ROWS_PER_PAGE, NUM_ROWS, NUM_PAGES)
    hits = 0
    for rows, times in steps:
        plan = cache.plan(rows, times)
        cache.commit(plan)
        hits += int(plan.resident.sum())
    return hits


def miniatures(share: float = 1.0, seed: int = 0) -> MiniatureCaches:
    return MiniatureCaches(NUM_PAGES, ROWS_PER_PAGE, NUM_ROWS, SpatialSample(share, seed))


@pytest.mark.parametrize(("share", "tolerance"), [(1.0, 0.05), (0.25, 0.15)])
@pytest.mark.parametrize("pages", [80, 240])
def test_a_step_more_and_less_is_worth_what_the_tenant_itself_gains(
    pages: int, share: float, tolerance: float
) -> None:
    step = pages // 8
    steps = zipf_steps(600, 300, seed=pages)
    small = miniatures(share, seed=1)
    small.resize(pages, step)
    for rows, times in steps:
        small.observe(rows, times)
    small.resize(pages, step)  # Looks up what was kept.
    less, now, more = (hits_of(size, steps) for size in (pages - step, pages, pages + step))
    slots = step * ROWS_PER_PAGE
    gains = small.gains()
    assert gains.more + gains.less == pytest.approx((more - less) / slots, rel=tolerance)
    if share == 1.0:
        assert gains.more == pytest.approx((more - now) / slots, rel=2 * tolerance)
        assert gains.less == pytest.approx((now - less) / slots, rel=2 * tolerance)


def test_settled_after_a_move_miniatures_say_what_those_of_the_new_size_say() -> None:
    moved, there = miniatures(0.25), miniatures(0.25)
    moved.resize(40, 5)
    there.resize(160, 20)
    for one in (moved, there):
        for rows, times in zipf_steps(300, 300, seed=1):
            one.observe(rows, times)
    assert moved.resize(160, 20) < 0.01
    for one in (moved, there):
        for seed in (2, 3):
            one.fade(0.0)
            for rows, times in zipf_steps(400, 300, seed):
                one.observe(rows, times)
    assert sum(moved.gains()) == pytest.approx(sum(there.gains()), rel=0.1)


def test_a_move_by_one_step_leaves_a_part_of_what_was_learnt() -> None:
    small = miniatures()
    small.resize(80, 10)
    for rows, times in zipf_steps(20, 300, seed=1):
        small.observe(rows, times)
    small.resize(80, 10)
    before = small.gains()
    assert small.resize(90, 10) == pytest.approx(np.exp(-1.0))
    assert small.gains() == pytest.approx(np.array(before) * np.exp(-1.0))


def test_a_tenant_without_pages_may_still_want_some() -> None:
    small = miniatures()
    small.resize(0, 4)
    for rows, times in zipf_steps(100, 300, seed=1):
        small.observe(rows, times)
    small.resize(0, 4)
    assert small.gains().more > 0.0
    assert small.gains().less == 0.0


def test_steps_of_any_size_are_taken() -> None:
    small = miniatures()
    small.resize(80, 10)
    rows = np.arange(NUM_ROWS)
    small.observe(rows, np.ones(NUM_ROWS, dtype=np.int64))
    small.observe(rows[:0], rows[:0])
    assert small.num_samples == NUM_ROWS


def test_the_sample_is_a_share_that_the_seed_alone_decides() -> None:
    places, number = SpatialSample(0.25, seed=1).places(NUM_ROWS)
    again, _ = SpatialSample(0.25, seed=1).places(NUM_ROWS)
    other, _ = SpatialSample(0.25, seed=2).places(NUM_ROWS)
    assert number == pytest.approx(NUM_ROWS / 4, rel=0.05)
    np.testing.assert_array_equal(places, again)
    chosen = places[places != NOT_SAMPLED]
    np.testing.assert_array_equal(chosen, np.arange(number))
    both = np.count_nonzero((places != NOT_SAMPLED) & (other != NOT_SAMPLED))
    assert both == pytest.approx(NUM_ROWS / 16, rel=0.1)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        SpatialSample(share, seed=0)

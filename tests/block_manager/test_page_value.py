"""Rates of the estimate: forgetting, the present split, bad configuration."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from block_manager.block_hash import hash_blocks, root_hash
from block_manager.decayed_seconds import DecayedSeconds
from block_manager.page_value import PageValue, PageValueEstimator, SamplingConfig
from block_manager.reuse_distance import PageCosts

BLOCK_TOKENS = 4
NUM_ROWS = 2000
ABSENT = np.full(NUM_ROWS, -1, dtype=np.int32)
EVERYTHING = SamplingConfig(user_share=1.0, row_share=1.0, window_s=10.0)


def estimator(config: SamplingConfig = EVERYTHING) -> PageValueEstimator:
    """Of a pool of 100 pages; a token costs 1 ms, a row 2."""
    made = PageValueEstimator(100, 8, BLOCK_TOKENS, NUM_ROWS, PageCosts(1.0, 0.0, 2.0), config)
    made.set_capacity(60, 40)
    return made


def visit(one: PageValueEstimator, user: int, num_blocks: int = 1) -> None:
    rows = np.full(num_blocks * BLOCK_TOKENS, -1)
    hashes = hash_blocks(root_hash("m", str(user).encode()), rows[:, None], BLOCK_TOKENS)
    one.observe_request(user, hashes, rows, rows[:0], ABSENT, 0, len(rows))


def visit_in_turn(one: PageValueEstimator, users: int, start: float, seconds: int) -> None:
    """Ten visits a second, of each user in turn."""
    nothing = np.empty(0, dtype=np.int64)
    for number in range(seconds * 10):
        visit(one, 1 + number % users)
        one.observe_step(nothing, nothing, start + number / 10)


def test_a_cyclic_scan_makes_the_pages_that_would_hold_all_of_it_worth_everything() -> None:
    one = estimator()
    visit_in_turn(one, 63, start=0.0, seconds=60)
    # 63 blocks and the null block. A page of the step to 67 pages spares a seventh of 4 ms, 10
    # times a second; all of it comes from the last of them.
    found = one.estimate(60.0).kv
    assert found.more == pytest.approx(40.0 / 7, rel=0.04)
    assert found.less == 0.0
    one.set_capacity(64, 36)
    found = one.estimate(60.0).kv
    assert found.less == pytest.approx(40.0 / 8, rel=0.04)
    assert found.more == 0.0
    assert found.num_samples == pytest.approx(10.0 * 10.0, rel=0.05)


def test_what_was_worth_much_is_forgotten_within_the_window() -> None:
    one = estimator()
    visit_in_turn(one, 63, start=0.0, seconds=60)
    before = one.estimate(60.0).kv.more
    assert one.estimate(70.0).kv.more == pytest.approx(before * exp(-1.0), rel=0.02)


def test_the_latest_estimate_follows_time_and_the_boundary() -> None:
    one = estimator()
    nothing = np.empty(0, dtype=np.int64)
    visit_in_turn(one, 63, start=0.0, seconds=60)
    for number in range(100):
        now = 60.0 + number / 50
        one.observe_step(nothing, nothing, now)
        # A 64th of the window is the most that it lags.
        assert one.latest.kv.more == pytest.approx(one.estimate(now).kv.more, rel=0.05)
    one.set_capacity(64, 36)
    one.observe_step(nothing, nothing, now)
    assert one.latest == one.estimate(now)
    assert one.latest.kv.less > 0.0 == one.latest.kv.more


def test_without_traffic_nothing_is_worth_anything() -> None:
    one = estimator()
    assert one.latest == PageValue()
    found = one.estimate(1.0)
    assert [found.kv.more, found.kv.less, found.emb.more, found.emb.less] == [0.0] * 4


def test_rows_that_would_fit_with_a_step_more_are_worth_their_misses() -> None:
    one = estimator()
    # Hotter rows than the tenant has slots for, by less than a step, all equally hot.
    rows = np.arange(40 * 8 + 5)
    for number in range(200):
        one.observe_step(rows, np.full(len(rows), 3), number / 10)
    found = one.estimate(20.0).emb
    # Five rows miss ten times a second; the step of five pages would hold them.
    assert found.more == pytest.approx(5 * 10 * 2.0 / 5, rel=0.05)
    assert found.less > found.more


def test_the_same_seed_gives_the_same_estimate() -> None:
    def run(seed: int) -> PageValue:
        one = estimator(SamplingConfig(user_share=0.5, row_share=0.5, seed=seed))
        rng = np.random.default_rng(1)
        for number in range(400):
            visit(one, int(rng.integers(1, 200)), 2)
            rows = np.unique(rng.integers(0, NUM_ROWS, 50) ** 2 // NUM_ROWS)
            one.observe_step(rows, np.ones_like(rows), number / 10)
        return one.estimate(40.0)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_steady_rate_is_that_rate_from_the_start_on() -> None:
    time = DecayedSeconds(10.0)
    total = 0.0
    for tick in range(1, 2000):
        now = tick / 20
        factor = time.advance(now)
        total = (total + 3.0 / 20) * (1.0 if factor is None else factor)
        if tick in (40, 400, 1999):
            assert time.rate(total, now) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(user_share=0.0), SamplingConfig(row_share=0.0), SamplingConfig(window_s=0.0)],
)
def test_shares_and_the_window_must_be_above_0(config: SamplingConfig) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        estimator(config)

"""The estimate of what a page is worth against brute force: the same trace with other splits.

`benchmarks/page_value.py` does the same with more users, splits and sampling.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.page_value import PROFILES, Size, brute_force, estimates
from benchmarks.priced_replay import Replay, TracedVisit
from block_manager.page_value import SamplingConfig
from block_manager.refill import HostTraffic
from helm_engine.engine_stats import EngineStats
from helm_engine.recommender import Recommender
from tests.e2e.running_server import REPOSITORY
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

EVERYTHING = SamplingConfig(user_share=1.0, row_share=1.0, window_s=2.0)
FLOOR_MS = 0.002
"""Per page and second: a hundredth of what a page is worth to a tenant that lacks some. What is
below is worth nothing, and a replay that differs by a few visits says as much."""

SIZE = Size(
    users=600,
    items=20_000,
    warm_visits=2500,
    visits=3500,
    splits={
        "small_kv": (500, 150),
        "small_emb": (1500, 40),
        "both_large": (4000, 400),
    },
)


@pytest.fixture(scope="module")
def trace() -> list[TracedVisit]:
    return SIZE.trace(seed=1)


@pytest.mark.parametrize("name", SIZE.splits)
def test_estimates_are_within_a_tenth_of_brute_force(name: str, trace: list[TracedVisit]) -> None:
    profile, split = PROFILES["slow_tier"], SIZE.splits[name]
    truth = brute_force(SIZE, trace, profile, split)
    (found,) = estimates(SIZE, trace, profile, split, [EVERYTHING])
    for tenant in ("kv", "emb"):
        expected, guess = truth[tenant], found[tenant]
        both = expected["more"] + expected["less"]
        assert guess["more"] + guess["less"] == pytest.approx(both, rel=0.1, abs=FLOOR_MS)
        assert guess["samples"] > 0


def test_estimates_follow_the_boundary(trace: list[TracedVisit]) -> None:
    """After a move the engine says what one says that had this split from the start."""
    found = []
    for split in ((1500, 400), (500, 1400)):
        replay = Replay(*split, SIZE.items, PROFILES["slow_tier"], [EVERYTHING])
        replay.play(trace[:2500])
        replay.scheduler.boundary.set_target(400 / 1900)
        replay.play(trace[2500:3500])
        assert replay.scheduler.pool.num_emb_pages == 400
        replay.panel.estimates.clear()
        replay.play(trace[3500:5000])
        found.append(replay.panel.means()[0])
        replay.core.check_integrity()
    there, moved = (one[:, :2].sum(axis=1) for one in found)
    np.testing.assert_allclose(moved, there, rtol=0.15)


def test_an_engine_with_a_cost_profile_reports_what_pages_are_worth(tmp_path: Path) -> None:
    config = toy_engine_config(write_toy_model(tmp_path / "toy", toy_config()), max_num_seqs=4)
    (profile,) = (REPOSITORY / "benchmarks" / "profiles").glob("*h100*.json")
    made = Recommender.from_config(replace(config, cost_profile=profile))
    body = {"user": "a", "history": {"item_ids": [3, 1, 4] * 12, "timestamps": [*range(36)]}}
    for _ in range(3):
        made.recommend(body)
    scheduler = made.engine.core.scheduler
    assert scheduler.page_values is not None
    value = scheduler.page_values.latest
    stats = EngineStats.of(scheduler, HostTraffic())
    assert stats.kv_page_gain_ms == value.kv.more
    assert stats.emb_page_loss_ms == value.emb.less
    assert Recommender.from_config(config).engine.core.scheduler.page_values is None

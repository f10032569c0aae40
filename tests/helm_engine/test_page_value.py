"""The estimate of what a page is worth against brute force: the same trace with other splits.

`benchmarks/page_value.py` does the same with more users, splits and sampling.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.page_value import PROFILES, Size, brute_force, estimates
from benchmarks.priced_replay import Replay, TracedVisit
from block_manager.page_value import SamplingConfig

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

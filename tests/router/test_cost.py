"""Prices of requests against those of an engine's steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_executor.cost_profile import CostProfile
from router.cost import EngineCosts, amounts_of_work, price_ms
from tests.model_executor.test_simulated import candidates, request, step_of
from tests.router.fleet import COSTS

PRICES = st.floats(0.0, 10.0)


@given(
    costs=st.builds(EngineCosts, *(8 * [PRICES])),
    num_tokens=st.integers(0, 200),
    num_candidates=st.integers(1, 20),
    cached_share=st.floats(0.0, 1.0),
    missing=st.integers(0, 30),
)
def test_request_costs_what_the_engines_profile_says_of_a_step_of_its_own(
    costs: EngineCosts, num_tokens: int, num_candidates: int, cached_share: float, missing: int
) -> None:
    cached = int(cached_share * num_tokens)
    amounts = amounts_of_work(num_tokens, num_candidates, np.array([cached]), np.array([missing]))
    (price,) = price_ms(costs.as_array()[None], amounts)
    profile = CostProfile(
        "toy",
        "made up",
        step_ms=costs.step_ms,
        request_ms=costs.request_ms,
        prefill_row_ms=costs.prefill_row_ms,
        attention_pair_ms=costs.attention_pair_ms,
        candidate_ms=costs.candidate_ms,
        candidate_pair_ms=costs.candidate_pair_ms,
        row_miss_ms=costs.row_miss_ms,
        round_trip_ms=costs.round_trip_ms,
        retrieval_ms=0.0,
    )
    part = request("r", cached, num_tokens - cached, candidates(num_candidates))
    timings = profile.price(step_of(part, missing=missing))
    assert price == pytest.approx(timings.load + timings.prefill + timings.score)


def test_every_engine_is_priced_by_its_own_costs() -> None:
    costs = np.stack([COSTS.as_array(), replace(COSTS, row_miss_ms=1.0).as_array()])
    amounts = amounts_of_work(8, 0, np.array([0, 0]), np.array([3, 3]))
    first, second = price_ms(costs, amounts)
    assert second - first == pytest.approx(3 * 0.95)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_bad_cost_is_named(value: float) -> None:
    with pytest.raises(ValueError, match="candidate_ms"):
        replace(COSTS, candidate_ms=value)

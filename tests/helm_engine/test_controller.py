"""The controller's shell: integration, bounds, holding, names; time is a number in these tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from helm_engine.controller.allocation_controller import AdaptiveController, StaticController
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import FEATURES, Observation
from helm_engine.controller.registry import check_controller, controller_names, make_controller

CALM = Observation(num_requests=500.0, slo_ms=80.0, emb_fraction=0.5, num_pages=1000)


class Fixed:
    """Always the same rate; or one of a list after the other."""

    def __init__(self, *rates: float) -> None:
        self.rates = rates
        self.times: list[float] = []

    def rate(self, observation: Observation) -> float:
        self.times.append(observation.now)
        return self.rates[min(len(self.times), len(self.rates)) - 1]


def seen(observation: Observation = CALM) -> Callable[[float], Observation]:
    return lambda now: replace(observation, now=now)


def follow(controller: AdaptiveController, times: Sequence[float], start: float = 0.5) -> float:
    """Asks at all times over a pool that moves at once; returns the last target."""
    split = start
    for now in times:
        split = controller.decide(now, split, seen())
    return split


PERIOD = 1.0
CONFIG = ControllerConfig(period_s=PERIOD)


@given(
    rate=st.floats(-1.0, 1.0),
    start=st.floats(0.1, 0.9),
    splits=st.lists(st.floats(0.0, 3.0), max_size=40),
    length=st.floats(0.0, 3.0),
)
def test_the_target_does_not_depend_on_the_length_of_steps(
    rate: float, start: float, splits: list[float], length: float
) -> None:
    coarse = [k * PERIOD for k in range(int(length) + 1)] + [length]
    fine = sorted([*coarse, *(one for one in splits if one <= length)])
    targets = [
        follow(AdaptiveController(Fixed(rate), CONFIG), times, start) for times in (coarse, fine)
    ]
    expected = min(0.9, max(0.1, start + rate * CONFIG.slew_per_s * length))
    assert targets == pytest.approx([expected, expected], abs=1e-9)


@given(
    rates=st.lists(st.floats(-9.0, 9.0), min_size=1, max_size=9),
    gaps=st.lists(st.floats(0.0, 2.5), min_size=1, max_size=30),
    start=st.floats(0.0, 1.0),
    moves=st.booleans(),
)
def test_slew_and_bounds_hold_whatever_a_policy_says(
    rates: list[float], gaps: list[float], start: float, moves: bool
) -> None:
    controller = AdaptiveController(Fixed(*rates), CONFIG)
    now, committed = 0.0, start
    target = controller.decide(now, committed, seen())
    for gap in gaps:
        now += gap
        after = controller.decide(now, committed, seen())
        assert abs(after - target) <= CONFIG.slew_per_s * gap + 1e-9
        # A start beyond the bounds may only come nearer.
        assert min(0.1, target) <= after <= max(0.9, target)
        target = after
        committed = target if moves else committed
        # What cannot move does not let the target run away.
        assert abs(target - committed) <= CONFIG.slew_per_s * PERIOD + 1e-9


def test_the_policy_is_asked_once_a_period_on_a_grid() -> None:
    policy = Fixed(0.0)
    follow(AdaptiveController(policy, CONFIG), np.arange(0.0, 5.0, 0.13).tolist())
    assert np.floor(policy.times).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    late = Fixed(0.0)
    follow(AdaptiveController(late, CONFIG), [0.0, 7.4, 7.5, 8.3, 8.4])
    assert late.times == [0.0, 7.4, 8.4]


def test_a_rate_does_not_outlive_a_pause() -> None:
    controller = AdaptiveController(Fixed(-0.5, 0.0), CONFIG)
    assert follow(controller, [0.0, 100.0], start=0.8) == pytest.approx(0.8 - 0.15 * 2.0)


@pytest.mark.parametrize(
    ("policy", "observation", "reason"),
    [
        (Fixed(1.0, nan), CALM, "did not return a number"),
        (Fixed(1.0, inf), CALM, "did not return a number"),
        (Fixed(1.0), replace(CALM, emb_page_gain_ms=nan), "observation is not a number"),
        (Fixed(1.0), replace(CALM, p99_over_slo=inf), "observation is not a number"),
        (Fixed(1.0), replace(CALM, age_s=11.0), "no request has ended lately"),
        (Fixed(1.0), replace(CALM, num_requests=0.0), "no request has ended lately"),
    ],
)
def test_without_numbers_the_committed_split_is_held(
    policy: Fixed, observation: Observation, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    controller = AdaptiveController(policy, CONFIG)
    controller.decide(0.0, 0.5, seen())
    assert controller.decide(0.9, 0.6, seen()) == pytest.approx(0.5 + 0.9 * 0.3)
    for now in (1.0, 1.5, 2.0, 2.9):
        assert controller.decide(now, 0.61, seen(observation)) == 0.61
    decision = controller.latest
    assert decision is not None
    assert reason in str(decision.held)
    assert (decision.rate, controller.num_queries, controller.num_holds) == (0.0, 3, 2)
    # Said once, not at each query.
    assert [record.getMessage().count("held at 0.610") for record in caplog.records] == [1]


def test_a_policy_that_breaks_does_not_break_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def rate(self, observation: Observation) -> float:
            raise RuntimeError("the file is damaged")

    controller = AdaptiveController(Broken(), CONFIG)
    assert controller.decide(0.0, 0.4, seen()) == 0.4
    assert "RuntimeError: the file is damaged" in caplog.text


def test_a_static_split_is_wanted_at_once_and_asks_nobody() -> None:
    controller = make_controller("static:0.35")
    assert isinstance(controller, StaticController)

    def observe(now: float) -> Observation:
        raise AssertionError("nothing is to be observed")

    assert [controller.decide(now, 0.9, observe) for now in (0.0, 5.0)] == [0.35, 0.35]


def test_every_name_makes_a_controller_and_others_list_them() -> None:
    for name in controller_names():
        for suffix in ("", "+recovery") if name != "static:X" else ("",):
            made = make_controller(name.replace("X", "0.5") + suffix)
            assert 0.1 <= made.decide(0.0, 0.5, seen()) <= 0.9
    for wrong in ("ppo", "", "Marginal", "marginal+", "+recovery"):
        with pytest.raises(ValueError, match=r"unknown \(known: static:X, threshold, .*ms_per"):
            make_controller(wrong)
    for wrong in ("static:", "static:x", "static:1.5", "static:nan", "static:0.5+recovery"):
        with pytest.raises(ValueError, match=r"controller: .*static:X"):
            make_controller(wrong)
    with pytest.raises(ValueError, match="marginal needs cost_profile"):
        check_controller("marginal", has_costs=False)
    with pytest.raises(ValueError, match=r"helm.residual needs cost_profile"):
        check_controller("helm+residual", has_costs=False)
    check_controller("marginal", has_costs=True)
    check_controller("helm+recovery", has_costs=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("period_s", 0.2, "control_period: must be within 0.25..5"),
        ("period_s", nan, "control_period: must be within"),
        ("slo_ms", 0.0, "slo_ms: must be above 0"),
        ("slew_per_s", inf, "slew_per_s: must be above 0 and finite"),
        ("least_share", 0.95, "least_share: must be within"),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControllerConfig(**{field: value})


@given(
    st.builds(
        Observation,
        hot_user_share=st.floats(0.0, 1.0),
        kv_hit_rate=st.floats(0.0, 1.0),
        mean_history_tokens=st.floats(0.0, 1e6),
        p99_over_slo=st.floats(0.0, 1e4),
        kv_page_gain_ms=st.floats(0.0, 1e6),
        emb_page_loss_ms=st.floats(0.0, 1e6),
        arrival_rate=st.floats(0.0, 1e6),
        arrival_jump=st.floats(0.0, 1e6),
        arrival_jump_sigmas=st.floats(-1e3, 1e3),
        foreground_bytes_per_s=st.floats(0.0, 1e12),
        queue_delay_ms=st.floats(0.0, 1e6),
        target_lag=st.floats(-1.0, 1.0),
        age_s=st.floats(0.0, 1e6),
        num_requests=st.floats(0.0, 1e9),
        num_pages=st.integers(1, 10**8),
        slo_ms=st.floats(0.1, 1e4),
    )
)
def test_the_vector_is_bounded_and_named(observation: Observation) -> None:
    vector = observation.vector()
    assert vector.dtype == np.float32
    assert vector.shape == (len(FEATURES),)
    assert np.abs(vector).max() <= 1.0
    assert vector[FEATURES.index("kv_hit_rate")] == np.float32(observation.kv_hit_rate)
    assert vector[FEATURES.index("target_lag")] == np.float32(observation.target_lag)

"""What a split costs in the eyes of the teacher, where it wants to go, what its pupil learns."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy

from helm_engine.controller.base_policy import ACTIONS
from helm_engine.controller.observation import FEATURES
from helm_engine.simulator.environment import Episode
from helm_engine.simulator.imitation import imitate
from helm_engine.simulator.simulation import EngineModel
from helm_engine.simulator.static_work import another_device, static_work
from helm_engine.simulator.teacher import (
    Examples,
    best_course,
    costs_over_time,
    demonstrate,
    slowdown,
)
from helm_engine.simulator.trace import make_trace
from tests.simulator.small import PROFILE, regime, workload


def episode() -> Episode:
    tight = workload(regime(seconds=12.0), warm_up_s=0.0, pool_bytes=1 << 20, num_items=60_000)
    trace = make_trace(tight, seed=3)
    return Episode(trace, EngineModel(trace.setting, PROFILE), 0.5)


def test_the_slowdown_is_that_of_a_queue_and_goes_on_straight_where_there_is_too_much_work() -> (
    None
):
    busy = np.linspace(0.0, 0.9, 19)
    assert slowdown(busy) == pytest.approx([1.0 / (1.0 - one) for one in busy])
    above = slowdown(np.array([0.9, 1.0, 1.1, 1.2]))
    assert np.diff(above) == pytest.approx(np.full(3, above[1] - above[0]))
    step = 1e-6
    slopes = [float(np.diff(slowdown(np.array([at, at + step])))[0]) for at in (0.9 - step, 0.9)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)


def test_costs_are_the_slowdown_of_then_and_the_mean_of_all() -> None:
    costs = costs_over_time(static_work(episode()).on(1.0))
    # The mean over time of x + mean(x) is twice the mean, and no slowdown is below 1.
    mean = costs.mean(axis=0) / 2.0
    assert (costs - mean >= 1.0 - 1e-9).all()
    assert (mean >= 1.0).all()


def test_the_best_course_costs_the_least_of_all_courses() -> None:
    rng = np.random.default_rng(5)
    splits = np.linspace(0.1, 0.9, 41)
    costs = np.full((4, 41), 1e9)
    places = [3, 4, 5, 20]
    costs[:, places] = rng.uniform(0.0, 9.0, (4, len(places)))
    slew = 0.31  # From 5 to 20 are fifteen steps of 0.02.

    def cost(course: tuple[int, ...], begin: int) -> float:
        before, total = begin, 0.0
        for second, place in enumerate(course):
            away = abs(splits[place] - splits[before])
            total += costs[second, place] + (30.0 * away if away <= slew else np.inf)
            before = place
        return total

    course = best_course(costs, slew)
    for begin in places:
        found: list[int] = []
        for second in range(4):
            at = found[-1] if found else begin
            found.append(int(np.abs(splits - course[second, at]).argmin()))
        least = min(cost(one, begin) for one in itertools.product(places, repeat=4))
        assert cost(tuple(found), begin) == pytest.approx(least)


@given(st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_another_device_is_about_as_busy_with_the_same_requests(seed: int) -> None:
    made = episode()
    work = static_work(made)
    device = another_device(made, work, np.random.default_rng(seed))
    busy, before = (one.mean(axis=0).min() for one in (device.busy, work.on(1.0)))
    assert 0.8 - 1e-9 <= busy / before <= 1.25 + 1e-9
    assert device.episode.model.controller.slo_ms == device.episode.model.setting.slo_ms
    # What is worked out is what is found where that device is simulated.
    assert static_work(device.episode).on(1.0) == pytest.approx(device.busy, rel=0.05, abs=0.02)


@pytest.mark.parametrize(
    ("prices", "way"),
    [
        ({"row_miss_ms": 0.0, "prefill_row_ms": 0.3}, -1.0),
        ({"row_miss_ms": 0.6, "prefill_row_ms": 0.0}, 1.0),
    ],
)
def test_the_teacher_gives_the_pages_to_the_tenant_whose_misses_cost_anything(
    prices: dict[str, Any], way: float
) -> None:
    made = episode()
    model = replace(made.model, profile=replace(PROFILE, **prices))
    wrong = made._replace(model=model, emb_fraction=0.5 - 0.4 * way)
    found = demonstrate(wrong, np.random.default_rng(0))
    assert len(found.vectors) == len(found.rates) > 10
    assert np.abs(found.rates).max() <= 1.0
    assert (found.rates * way >= -0.1).all()  # 0 but for the two hundredths that are as good.
    assert (found.rates * way > 0.9).any()


def test_a_pupil_moves_four_times_what_it_expects_less_what_moving_costs() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.uniform(-1.0, 1.0, (12_000, len(FEATURES))).astype(np.float32)
    # The same observation is followed by different rates, whose mean is a third of the first.
    rates = (rng.random(12_000) < np.abs(vectors[:, 0]) / 3.0) * np.sign(vectors[:, 0])
    policy = untrained()
    torch.manual_seed(0)
    explained = imitate(policy, Examples(vectors, rates.astype(np.float32)), 30, 1, lambda _: None)
    assert 0.0 < explained < 0.5
    with torch.no_grad():
        scores = policy.action_net(policy.mlp_extractor.policy_net(torch.from_numpy(vectors)))
    chosen = np.array(ACTIONS)[scores.argmax(dim=1).numpy()]
    wanted = 4.0 * vectors[:, 0] / 3.0
    expected = np.sign(wanted) * np.clip(np.abs(wanted) - 0.5, 0.0, 1.0)
    assert np.abs(chosen - expected).mean() < 0.2
    assert np.corrcoef(chosen, expected)[0, 1] > 0.9


def untrained() -> ActorCriticPolicy:
    class Nothing(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (len(FEATURES),), np.float32)
        action_space = gymnasium.spaces.Discrete(len(ACTIONS))

    return PPO("MlpPolicy", Nothing(), n_steps=2, batch_size=2, seed=1, device="cpu").policy

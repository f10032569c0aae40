"""The environment: what an agent does in it is what a controller does in the engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.base_policy import ACTIONS, load_base_policy
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import FEATURES, Observation
from helm_engine.simulator.environment import AllocationEnvironment, Episode, Reward
from helm_engine.simulator.random_workloads import EpisodeDrawer, vary_profile, vary_workload
from helm_engine.simulator.simulation import EngineModel, simulate
from helm_engine.simulator.trace import make_trace
from helm_engine.simulator.train_controller import TrainingConfig, train
from helm_engine.simulator.workloads import load_workload
from tests.simulator.small import PROFILE, regime, workload

WORKLOAD = workload(regime(seconds=12.0), warm_up_s=0.0)


def episode(rng: np.random.Generator) -> Episode:
    trace = make_trace(WORKLOAD, 3)
    return Episode(trace, EngineModel(trace.setting, PROFILE), 0.5)


def choice(number: int) -> int:
    return (number * 5) % len(ACTIONS)


class Scripted:
    """Does what the agent below does, inside the engine."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def rate(self, observation: Observation) -> float:
        self.seen.append(observation)
        return ACTIONS[choice(len(self.seen) - 1)]


def test_an_agent_sees_and_does_what_a_policy_does_in_the_engine() -> None:
    environment = AllocationEnvironment(episode)
    vectors = [environment.reset(seed=1)[0]]
    rewards, is_over = [], False
    while not is_over:
        vector, reward, ended, is_over, _ = environment.step(np.int64(choice(len(vectors) - 1)))
        assert not ended
        vectors.append(vector)
        rewards.append(reward)
    made = episode(np.random.default_rng(0))
    policy = Scripted()
    simulate(made.trace, made.model, 0.5, controller=AdaptiveController(policy))
    assert len(policy.seen) == len(vectors) - 1
    for vector, observation in zip(vectors, policy.seen, strict=False):
        np.testing.assert_array_equal(vector, observation.vector())
    assert vectors[0].shape == (len(FEATURES),)
    assert max(rewards) <= 0.0


def test_rewards_are_what_the_step_log_says() -> None:
    weights = Reward(service_weight=1.0, violation_weight=0.0, delay_weight=0.0)
    environment = AllocationEnvironment(episode, weights)
    environment.reset(seed=1)
    spent, is_over = 0.0, False
    terms = []
    while not is_over:
        _, reward, _, is_over, info = environment.step(np.int64(3))
        terms.append(info["terms"])
        spent -= reward
    assert spent == pytest.approx(sum(one["service"] for one in terms if one))
    made = episode(np.random.default_rng(0))
    result = simulate(made.trace, made.model, 0.5, controller=AdaptiveController(Still()))
    service_ms = float((result.steps["load_ms"] + result.steps["prefill_ms"]).sum())
    requests = len(made.trace)
    mean = np.mean([one["service"] for one in terms if one]) * made.model.setting.slo_ms
    # The first period, before the first query, is nobody's; periods hold about as many requests.
    assert mean == pytest.approx(service_ms / requests, rel=0.35)


class Still:
    def rate(self, observation: Observation) -> float:
        return 0.0


def test_it_is_an_environment_of_gymnasium() -> None:
    check_env(AllocationEnvironment(episode), skip_render_check=True)


def test_an_episode_can_be_left_at_any_time() -> None:
    left, fresh = AllocationEnvironment(episode), AllocationEnvironment(episode)
    engines = threading.active_count()
    left.reset(seed=1)
    left.step(np.int64(0))
    assert left.reset(seed=2)[0].tolist() == fresh.reset(seed=2)[0].tolist()
    assert threading.active_count() == engines + 2
    for environment in (left, fresh, left):
        environment.close()
    assert threading.active_count() == engines


def test_an_engine_that_breaks_tells_the_agent() -> None:
    def breaks(rng: np.random.Generator) -> Episode:
        made = episode(rng)
        return made._replace(model=EngineModel(made.model.setting, PROFILE, scale=2))

    environment = AllocationEnvironment(breaks)
    with pytest.raises(Exception):  # noqa: B017 (a trace of scale 1 means nothing to it)
        environment.reset(seed=1)
        for _ in range(100):
            environment.step(np.int64(0))


def test_the_same_seed_draws_the_same_episodes() -> None:
    def drawn(seed: int) -> list[tuple[float, float, int]]:
        draw, rng = EpisodeDrawer(64, 20.0), np.random.default_rng(seed)
        made = [draw(rng) for _ in range(3)]
        return [(one.emb_fraction, one.model.profile.row_miss_ms, len(one.trace)) for one in made]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_varied_workloads_fit_their_setting_and_last_as_long_as_asked() -> None:
    rng = np.random.default_rng(5)
    for name in ("steady", "trend", "burst"):
        for _ in range(20):
            varied = vary_workload(load_workload(name), 300.0, rng)
            varied.check_fits(varied.resolved_setting)
            assert varied.ends[-1] == pytest.approx(300.0)
            assert not varied.regimes[0].ramp_s
    for _ in range(20):
        assert 0.8 <= vary_profile(PROFILE, rng).row_miss_ms / PROFILE.row_miss_ms <= 1.25


def test_training_writes_a_policy_that_the_engine_reads(tmp_path: Path) -> None:
    config = TrainingConfig(
        max_requests=1, processes=1, teacher_episodes=2, imitation_epochs=10, episode_s=40.0,
        rollout=32, scale=64,
        control=ControllerConfig(period_s=1.0),
    )  # fmt: skip
    said: list[str] = []
    train(config, tmp_path, said.append)
    policy = load_base_policy(tmp_path / "policy.safetensors")
    assert policy.rate(Observation()) in ACTIONS
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert len(curve) == 1
    assert said[0] == "1 episodes, driven by the teacher"
    assert said[1].startswith("imitation, epoch 10: ")
    assert said[2] == "1 episodes, driven by the pupil"
    assert said[3].startswith("imitation, epoch 10: ")
    assert said[4].startswith("queries 32")
    assert curve[0]["queries"] == 32
    assert curve[0]["requests"] > 0

"""What a policy should have done, seen in hindsight: examples to begin its training with.

A trace is run at a handful of static splits, on a device so fast that nothing queues. The split at
which the requests of the next seconds cost least is where the boundary should go; an example is an
observation of a run that strays at random, with the action that leads there. The teacher knows the
next seconds and the policy does not, so the policy learns what can be told from what is seen.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.base_policy import ACTIONS
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.simulator.environment import Episode
from helm_engine.simulator.random_workloads import EpisodeDrawer
from helm_engine.simulator.simulation import simulate

FloatArray = npt.NDArray[np.float64]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85)
"""Static splits that are run; between them costs are taken for straight lines."""
_GRID = np.linspace(0.1, 0.9, 41)
_HASTE = 4.0
"""The device is so many times faster while splits are compared."""
_BEHIND_S, _AHEAD_S = 2.0, 6.0
"""Seconds around a moment whose requests tell what a split costs then."""
_TOLERANCE = 0.02
"""Splits that cost so much more than the cheapest are as good."""
_STRAY_SHARE, _STRAY_QUERIES = 0.12, 6
"""How often a demonstration begins to stray, and for how many queries at most."""


class Examples(NamedTuple):
    """Observations and what to do."""

    vectors: npt.NDArray[np.float32]
    """`Observation.vector` of each, float32 [n, features]."""
    actions: npt.NDArray[np.int64]
    """Place in `ACTIONS` of each, int64 [n]."""


def costs_over_time(episode: Episode) -> FloatArray:
    """Milliseconds of loads and prefill for a request at each static split in each second.

    Returns:
        float64 [seconds, len(_GRID)].
    """
    model = episode.model
    profile = model.profile
    prices = ("step_ms", "prefill_row_ms", "attention_pair_ms", "candidate_ms", "row_miss_ms",
              "round_trip_ms", "row_copy_ms")  # fmt: skip
    fast = replace(profile, **{name: getattr(profile, name) / _HASTE for name in prices})
    still = replace(model, profile=fast, controller=ControllerConfig())
    seconds = int(episode.trace.seconds) + 1
    found = np.empty((seconds, len(SHARES)))
    for place, share in enumerate(SHARES):
        steps = simulate(episode.trace, still, share).steps
        second = np.minimum(steps["began_s"].astype(np.int64), seconds - 1)
        spent = np.bincount(second, steps["load_ms"] + steps["prefill_ms"], seconds)
        served = np.bincount(second, steps["requests"], seconds)
        found[:, place] = _around(spent) / np.maximum(_around(served), 1.0) * _HASTE
    return np.stack([np.interp(_GRID, SHARES, costs) for costs in found])


def _around(each_second: npt.NDArray[Any]) -> FloatArray:
    """Sums over the seconds around each one."""
    total = np.concatenate([[0.0], np.cumsum(each_second)])
    now = np.arange(len(each_second))
    begin = np.maximum(0, now - int(_BEHIND_S))
    end = np.minimum(len(each_second), now + int(_AHEAD_S))
    sums: FloatArray = total[end] - total[begin]
    return sums


class _Demonstrator:
    """A policy that knows the costs of the next seconds, and strays now and then."""

    def __init__(
        self, costs: FloatArray, config: ControllerConfig, rng: np.random.Generator
    ) -> None:
        self._costs = costs
        self._step = config.slew_per_s * config.period_s
        self._rng = rng
        self._astray = 0
        self._stray_action = 0
        self.vectors: list[npt.NDArray[np.float32]] = []
        self.actions: list[int] = []

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`."""
        action = self._best_action(observation)
        self.vectors.append(observation.vector())
        self.actions.append(action)
        if self._astray:
            self._astray -= 1
            return ACTIONS[self._stray_action]
        if self._rng.random() < _STRAY_SHARE:
            self._astray = int(self._rng.integers(_STRAY_QUERIES))
            self._stray_action = int(self._rng.integers(len(ACTIONS)))
        return ACTIONS[action]

    def _best_action(self, observation: Observation) -> int:
        costs = self._costs[min(int(observation.now), len(self._costs) - 1)]
        # As far as it will have moved by then, so that a move under way is not asked for again.
        split = observation.emb_fraction + observation.target_lag
        good = _GRID[costs <= costs.min() * (1.0 + _TOLERANCE)]
        away = good - split
        nearest = away[np.abs(away).argmin()]
        wanted = 0.0 if abs(nearest) < self._step / 6.0 else nearest / self._step
        return int(np.abs(np.array(ACTIONS) - wanted).argmin())


def demonstrate(episode: Episode, rng: np.random.Generator) -> Examples:
    """Examples of one episode, twice from other splits."""
    costs = costs_over_time(episode)
    config = episode.model.controller
    vectors: list[npt.NDArray[np.float32]] = []
    actions: list[int] = []
    for start in (episode.emb_fraction, float(rng.uniform(0.1, 0.9))):
        policy = _Demonstrator(costs, config, rng)
        simulate(episode.trace, episode.model, start, controller=AdaptiveController(policy, config))
        vectors += policy.vectors
        actions += policy.actions
    return Examples(np.array(vectors), np.array(actions))


def gather_examples(seeds: list[int], drawer: EpisodeDrawer, processes: int) -> Examples:
    """Examples of one episode for each seed."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_of_seed, seeds, [drawer] * len(seeds)))
    vectors, actions = zip(*found, strict=True)
    return Examples(np.concatenate(vectors), np.concatenate(actions))


def _of_seed(seed: int, drawer: EpisodeDrawer) -> Examples:
    rng = np.random.default_rng(seed)
    return demonstrate(drawer(rng), rng)

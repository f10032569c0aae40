"""What a policy should have done, seen in hindsight: examples to begin its training with.

How busy static splits would keep the device is known (`static_work.py`). Requests wait the longer
the busier it is, so what a split costs is told by the slowdown of a queue and not by milliseconds:
a dear split is bearable where there is room, and the last tenth of a device is what P99 is made of.

What is sought is the course of the boundary with the least sum of three costs: the slowdown of each
second, the mean slowdown that its split has over the whole trace, and a price for each move. The
second is for what nobody can foresee. Traffic turns from one moment to the next, and who is then at
the end that the new traffic dislikes most makes the queue that P99 shows. The third keeps the
boundary where it is when another split is hardly better or soon will not be. Courses keep the slew
limit, and the best one is found backwards from the end, for every split that a run may have strayed
to (Bellman, Dynamic Programming, 1957).

Each trace is seen on several devices. They differ in what a row costs that is loaded, against the
work that is computed, and so in where the boundary should be; how busy they are, and their service
level in milliseconds of their own, are like those of the device that the load was chosen for.

An example is an observation of a run that strays at random, with the rate that leads there. The
teacher knows the next seconds and the policy does not, so the policy learns what can be told from
what is seen.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.base_policy import ACTIONS, BasePolicy, load_base_policy
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.simulator.environment import Episode
from helm_engine.simulator.random_workloads import EpisodeDrawer
from helm_engine.simulator.simulation import simulate
from helm_engine.simulator.static_work import SHARES, Device, another_device, static_work

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

_GRID = np.linspace(0.1, 0.9, 41)
_BEHIND_S, _AHEAD_S = 2.0, 4.0
"""Seconds around a moment whose requests tell what a split costs then."""
_BUSIEST = 0.9
"""Busy share up to which the slowdown is that of a queue, 1 / (1 - busy); above it goes on in the
tangent, since a device can be asked for more than it has for a while."""
_MOVE_COST = 30.0
"""Of a move of the whole pool, in seconds of a slowdown of 1."""
_DEVICES = 2
"""Of each trace."""
_STRAY_SHARE, _STRAY_S = 0.06, 6.0
"""Share of the queries at which a run begins to stray, and for how many seconds at most."""


class Examples(NamedTuple):
    """Observations and what to do."""

    vectors: Float32Array
    """`Observation.vector` of each, float32 [n, features]."""
    rates: Float32Array
    """Shares of the slew limit, -1..1, float32 [n]."""

    def joined(self, more: Examples) -> Examples:
        """These, and then those."""
        return Examples(
            np.concatenate([self.vectors, more.vectors]), np.concatenate([self.rates, more.rates])
        )


def costs_over_time(busy: FloatArray) -> FloatArray:
    """What each split costs in each second: the slowdown of then and the mean slowdown.

    Args:
        busy: of each static split, see `Device`.

    Returns:
        float64 [seconds, len(_GRID)].
    """
    around = _around(busy)
    slowdowns = slowdown(np.stack([np.interp(_GRID, SHARES, one) for one in around]))
    costs: FloatArray = slowdowns + slowdowns.mean(axis=0)
    return costs


def best_course(costs: FloatArray, slew_per_s: float) -> FloatArray:
    """Where to be after each second, from wherever one is at its beginning.

    Args:
        costs: of each split in each second, float64 [seconds, len(_GRID)].
        slew_per_s: share of the pool that may change hands in a second.

    Returns:
        float64 [seconds, len(_GRID)], splits.
    """
    away = np.abs(_GRID[:, None] - _GRID)
    moves = np.where(away <= slew_per_s + 1e-9, _MOVE_COST * away, np.inf)
    to_come = np.zeros(len(_GRID))
    course = np.empty_like(costs)
    for second in range(len(costs) - 1, -1, -1):
        all_costs = moves + (costs[second] + to_come)
        best = all_costs.argmin(axis=1)
        course[second] = _GRID[best]
        to_come = all_costs[np.arange(len(_GRID)), best]
    return course


def slowdown(busy: FloatArray) -> FloatArray:
    """How many times longer requests take than alone, on a device that is busy for such a share.

    That of an M/M/1 queue, continued in its tangent above `_BUSIEST`.
    """
    room = 1.0 - np.minimum(busy, _BUSIEST)
    slower: FloatArray = 1.0 / room + np.maximum(busy - _BUSIEST, 0.0) / (1.0 - _BUSIEST) ** 2
    return slower


def _around(each_second: FloatArray) -> FloatArray:
    """Means over the seconds around each one, float64 [seconds, ...]."""
    total = np.concatenate([np.zeros_like(each_second[:1]), np.cumsum(each_second, axis=0)])
    now = np.arange(len(each_second))
    begin = np.maximum(0, now - int(_BEHIND_S))
    end = np.minimum(len(each_second), now + int(_AHEAD_S))
    means: FloatArray = (total[end] - total[begin]) / (end - begin)[:, None]
    return means


class _Demonstrator:
    """Drives a run as the teacher or a pupil would, and notes what the teacher wants.

    Now and then it strays, so that there are examples of the way back.
    """

    def __init__(
        self,
        course: FloatArray,
        config: ControllerConfig,
        rng: np.random.Generator,
        pupil: BasePolicy | None,
    ) -> None:
        self._course = course
        self._period_s = config.period_s
        self._step = config.slew_per_s * config.period_s
        self._rng = rng
        self._pupil = pupil
        self._astray = 0
        self._stray_rate = 0.0
        self.vectors: list[Float32Array] = []
        self.rates: list[float] = []

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`."""
        wanted = self._wanted_rate(observation)
        self.vectors.append(observation.vector())
        self.rates.append(wanted)
        if self._astray:
            self._astray -= 1
            return self._stray_rate
        if self._rng.random() < _STRAY_SHARE:
            self._astray = int(self._rng.uniform(0.0, _STRAY_S) / self._period_s)
            self._stray_rate = ACTIONS[int(self._rng.integers(len(ACTIONS)))]
        return wanted if self._pupil is None else self._pupil.rate(observation)

    def _wanted_rate(self, observation: Observation) -> float:
        """Share of the slew limit that leads to where the best course goes next, -1..1."""
        course = self._course[min(int(observation.now), len(self._course) - 1)]
        # As far as it will have moved by then, so that a move under way is not asked for again.
        split = observation.emb_fraction + observation.target_lag
        return float(np.clip((np.interp(split, _GRID, course) - split) / self._step, -1.0, 1.0))


def demonstrate(
    episode: Episode, rng: np.random.Generator, pupil: BasePolicy | None = None
) -> Examples:
    """Examples of one episode, on several devices, on each from two splits.

    Args:
        episode: to run.
        rng: of devices, splits, and where it strays.
        pupil: who drives in the teacher's place; what the teacher would have done is noted all the
            same, so that the pupil learns what to do where its own mistakes lead (DAgger, Ross et
            al. 2011, arXiv 1011.0686).
    """
    work = static_work(episode)
    found = [_drive(another_device(episode, work, rng), rng, pupil) for _ in range(_DEVICES)]
    return reduce(Examples.joined, found)


def _drive(device: Device, rng: np.random.Generator, pupil: BasePolicy | None) -> Examples:
    episode = device.episode
    config = episode.model.controller
    course = best_course(costs_over_time(device.busy), config.slew_per_s)
    vectors: list[Float32Array] = []
    rates: list[float] = []
    for start in (episode.emb_fraction, float(rng.uniform(0.1, 0.9))):
        policy = _Demonstrator(course, config, rng, pupil)
        simulate(episode.trace, episode.model, start, controller=AdaptiveController(policy, config))
        vectors += policy.vectors
        rates += policy.rates
    return Examples(np.array(vectors), np.array(rates, dtype=np.float32))


def gather_examples(
    seeds: list[int], drawer: EpisodeDrawer, processes: int, pupil: Path | None = None
) -> Examples:
    """Examples of one episode for each seed; `pupil` is the file of a policy, see `demonstrate`."""
    number = len(seeds)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_of_seed, seeds, [drawer] * number, [pupil] * number))
    return reduce(Examples.joined, found)


def _of_seed(seed: int, drawer: EpisodeDrawer, pupil: Path | None) -> Examples:
    rng = np.random.default_rng(seed)
    return demonstrate(drawer(rng), rng, None if pupil is None else load_base_policy(pupil))

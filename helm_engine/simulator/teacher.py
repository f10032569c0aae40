"""What a policy should have done, seen in hindsight: examples to begin its training with.

A trace is run at a handful of static splits, on a device so fast that nothing queues, which tells
how busy the real device would be with the requests of each moment. Requests wait the longer the
busier it is, so what a split costs is told by the slowdown of a queue and not by milliseconds: a
dear split is bearable where there is room, and the last tenth of a device is what P99 is made of.

The boundary should go where the slowdown of now and the mean of the whole trace together are least.
The second term is for what nobody can foresee. Traffic turns from one moment to the next, and who
is then at the end that the new traffic dislikes most makes the queue that P99 shows.

An example is an observation of a run that strays at random, with the rate that leads there. The
teacher knows the next seconds and the policy does not, so the policy learns what can be told from
what is seen.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
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

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85)
"""Static splits that are run; between them a device is taken to be busy in straight lines."""
_GRID = np.linspace(0.1, 0.9, 41)
_HASTE = 4.0
"""The device is so many times faster while splits are compared."""
_BEHIND_S, _AHEAD_S = 2.0, 4.0
"""Seconds around a moment whose requests tell what a split costs then."""
_BUSIEST = 0.9
"""Busy share up to which the slowdown is that of a queue, 1 / (1 - busy); above it goes on in the
tangent, since a device can be asked for more than it has for a while."""
_TOLERANCE = 0.02
"""Splits that cost so much more than the cheapest are as good: no move is made for them."""
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


def costs_over_time(episode: Episode) -> FloatArray:
    """What each static split costs in each second: the slowdown of then and the mean slowdown.

    Returns:
        float64 [seconds, len(_GRID)].
    """
    model = episode.model
    profile = model.profile
    prices = {one.name: getattr(profile, one.name) for one in fields(profile)}
    fast = replace(
        profile, **{name: ms / _HASTE for name, ms in prices.items() if name.endswith("_ms")}
    )
    still = replace(model, profile=fast, controller=ControllerConfig())
    seconds = int(episode.trace.seconds) + 1
    found = np.empty((seconds, len(SHARES)))
    for place, share in enumerate(SHARES):
        steps = simulate(episode.trace, still, share).steps
        second = np.minimum(steps["began_s"].astype(np.int64), seconds - 1)
        found[:, place] = np.bincount(second, steps["ended_s"] - steps["began_s"], seconds)
    busy = _around(found * _HASTE)
    slowdowns = slowdown(np.stack([np.interp(_GRID, SHARES, one) for one in busy]))
    costs: FloatArray = slowdowns + slowdowns.mean(axis=0)
    return costs


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
        costs: FloatArray,
        config: ControllerConfig,
        rng: np.random.Generator,
        pupil: BasePolicy | None,
    ) -> None:
        self._costs = costs
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
        """Share of the slew limit that leads to the nearest good split in one period, -1..1."""
        costs = self._costs[min(int(observation.now), len(self._costs) - 1)]
        # As far as it will have moved by then, so that a move under way is not asked for again.
        split = observation.emb_fraction + observation.target_lag
        good = _GRID[costs <= costs.min() * (1.0 + _TOLERANCE)]
        away = good - split
        return float(np.clip(away[np.abs(away).argmin()] / self._step, -1.0, 1.0))


def demonstrate(
    episode: Episode, rng: np.random.Generator, pupil: BasePolicy | None = None
) -> Examples:
    """Examples of one episode, which is run twice, each time from another split.

    Args:
        episode: to run.
        rng: of where it strays.
        pupil: who drives in the teacher's place; what the teacher would have done is noted all the
            same, so that the pupil learns what to do where its own mistakes lead (DAgger, Ross et
            al. 2011, arXiv 1011.0686).
    """
    costs = costs_over_time(episode)
    config = episode.model.controller
    vectors: list[Float32Array] = []
    rates: list[float] = []
    for start in (episode.emb_fraction, float(rng.uniform(0.1, 0.9))):
        policy = _Demonstrator(costs, config, rng, pupil)
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

"""The engine in virtual time as an environment of gymnasium: an action for each control period.

The decision process is that of design, a semi-Markov one: the engine runs as many steps as it likes
between two queries of the policy. It runs in a thread of its own, which waits inside the query for
the agent's action, so what integrates, clips and holds is the very code that serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt

from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.base_policy import ACTIONS
from helm_engine.controller.observation import FEATURES, Observation
from helm_engine.exceptions import HelmError
from helm_engine.request import Request, RequestStatus
from helm_engine.simulator.open_loop import VirtualTimer, offer
from helm_engine.simulator.simulation import EngineModel, SimulatedEngine, arrivals
from helm_engine.simulator.trace import Trace

Float32Array = npt.NDArray[np.float32]

_MOST_LEVELS = 2.0
"""Service levels at which a cost is cut off, so that one collapse does not drown the rest."""


class Episode(NamedTuple):
    """What one episode runs through."""

    trace: Trace
    model: EngineModel
    """Of the trace's setting and scale; its controller's bounds and period hold."""
    emb_fraction: float
    """Where the split begins."""


@dataclass(frozen=True, slots=True)
class Reward:
    """What a period earns: minus the sum of three costs, each of them a metric."""

    service_weight: float = 2.0
    """Of the milliseconds that an ended request cost in row loads and recomputed tokens, in
    service levels."""
    violation_weight: float = 1.0
    """Of the share of ended requests that were slower than the service level; one that took n
    levels counts n times, up to two."""
    delay_weight: float = 1.0
    """Of the milliseconds for each ended request that steps spent on copies of moving rows, in
    service levels."""


@dataclass(slots=True)
class _Period:
    """What has happened since the last query."""

    ended: int = 0
    violations: float = 0.0
    first_step: int = 0


@dataclass(slots=True)
class _Asked:
    """A query of the policy, or None for the observation at the end of the trace."""

    observation: Observation | None
    reward: float
    terms: dict[str, float] = field(default_factory=dict)


class _Closed(BaseException):
    """The episode is over before the trace; no `Exception`, which a controller would survive."""


class AllocationEnvironment(gymnasium.Env[Float32Array, np.int64]):
    """One engine; an action is the rate of the split until the next query.

    Observations are `Observation.vector`, float32 [len(FEATURES)]; actions are places in `ACTIONS`.
    An episode ends with its trace, which is a truncation: in service the stream never ends.
    """

    def __init__(
        self, draw: Callable[[np.random.Generator], Episode], reward: Reward | None = None
    ) -> None:
        """Takes what draws an episode."""
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self._draw = draw
        self._reward = reward or Reward()
        self._run: _Run | None = None
        self._seen = np.zeros(len(FEATURES), dtype=np.float32)
        self.num_requests = 0
        """Of all episodes begun so far."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32Array, dict[str, Any]]:
        """Begins another episode; see `gymnasium.Env.reset`."""
        super().reset(seed=seed)
        self.close()
        asked: _Asked | None = None
        while asked is None or asked.observation is None:
            episode = self._draw(self.np_random)
            self.num_requests += len(episode.trace)
            self._run = _Run(episode, self._reward)
            asked = self._run.next_query()
        self._seen = asked.observation.vector()
        return self._seen, {}

    def step(self, action: np.int64) -> tuple[Float32Array, float, bool, bool, dict[str, Any]]:
        """Runs the engine until the policy is asked again; see `gymnasium.Env.step`."""
        assert self._run is not None, "reset comes first"
        self._run.answer(ACTIONS[int(action)])
        asked = self._run.next_query()
        is_over = asked.observation is None
        if asked.observation is not None:
            self._seen = asked.observation.vector()
        else:
            self._run = None
        return self._seen, asked.reward, False, is_over, {"terms": asked.terms}

    def close(self) -> None:
        """Ends the episode under way, if any."""
        if self._run is not None:
            self._run.close()
            self._run = None


class _Run:
    """An engine in a thread of its own; the `Policy` and the `Audience` of it."""

    def __init__(self, episode: Episode, reward: Reward) -> None:
        self._episode = episode
        self._weights = reward
        self._period = _Period()
        self._queries: SimpleQueue[_Asked | BaseException] = SimpleQueue()
        self._answers: SimpleQueue[float | None] = SimpleQueue()
        self._engine = SimulatedEngine(
            episode.model,
            episode.emb_fraction,
            AdaptiveController(self, episode.model.controller),
        )
        self._thread = Thread(target=self._work, name="simulated-engine", daemon=True)
        self._thread.start()

    # The agent's side.

    def next_query(self) -> _Asked:
        """Waits until the policy is asked, or the trace has ended."""
        asked = self._queries.get()
        if isinstance(asked, BaseException):
            raise asked
        return asked

    def answer(self, rate: float) -> None:
        """Lets the engine go on."""
        self._answers.put(rate)

    def close(self) -> None:
        """Ends the run at its next query."""
        self._answers.put(None)
        self._thread.join()

    # The engine's side.

    def _work(self) -> None:
        try:
            timer = VirtualTimer(self._engine.clock)
            offer(self._engine.core, timer, arrivals(self._episode.trace), self)
        except _Closed:
            return
        except BaseException as error:  # Raised where somebody waits for it.
            self._queries.put(error)
            return
        self._queries.put(self._ask(None))

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`."""
        self._queries.put(self._ask(observation))
        rate = self._answers.get()
        if rate is None:
            raise _Closed
        return rate

    def ended(self, request: Request, now: float) -> None:
        """See `open_loop.Audience`."""
        slo_ms = self._episode.model.setting.slo_ms
        levels = (now - request.arrival) * 1e3 / slo_ms
        failed = request.status is RequestStatus.FAILED
        self._period.ended += 1
        if failed or levels > 1.0:
            self._period.violations += _MOST_LEVELS if failed else min(levels, _MOST_LEVELS)

    def refused(self, request: Request, error: HelmError) -> None:
        """See `open_loop.Audience`: as bad as a request can end."""
        self._period.ended += 1
        self._period.violations += _MOST_LEVELS

    def _ask(self, observation: Observation | None) -> _Asked:
        period, log, model = self._period, self._engine.log, self._episode.model
        if not period.ended:
            return _Asked(observation, 0.0)  # What its steps cost counts in the next one.
        self._period = _Period(first_step=len(log))
        steps = log.latest(period.first_step)
        copy_ms = model.coarse_profile.row_copy_ms
        delay_ms = sum(step["moved_rows"] for step in steps) * copy_ms
        service_ms = sum(step["load_ms"] + step["prefill_ms"] for step in steps) - delay_ms
        level_ms = model.setting.slo_ms * period.ended
        terms = {
            "service": min(service_ms / level_ms, _MOST_LEVELS),
            "violations": period.violations / period.ended,
            "delay": min(delay_ms / level_ms, _MOST_LEVELS),
        }
        weights = self._weights
        cost = (
            weights.service_weight * terms["service"]
            + weights.violation_weight * terms["violations"]
            + weights.delay_weight * terms["delay"]
        )
        return _Asked(observation, -cost, terms)

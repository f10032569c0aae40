"""Where the target of the boundary is to be: a policy asked now and then, its rate in between.

A policy says how fast the split is to change, in shares of the slew limit; what integrates, clips
and holds is here, the same for every adaptive controller. So the target is a function of time and
not of how often the engine steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isfinite
from typing import Protocol

import msgspec

from helm_engine.controller.burst_recovery import BurstRecovery
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.controller.residual_adapter import ResidualAdapter

logger = logging.getLogger(__name__)

STALE_S = 10.0
"""Where no request has ended for so long, what was seen says nothing of now."""
_VALID_PERIODS = 2.0
"""A rate is integrated for so many periods at most: after a pause nobody knows what it was for."""


class Decision(msgspec.Struct, frozen=True):
    """What came of one query of a policy, and why."""

    at: float
    """Engine clock, seconds."""
    target: float
    """EMB's share of the pages when the policy was asked, 0..1."""
    committed: float
    """The split as it was then, 0..1."""
    rate: float = 0.0
    """What is integrated until the next query: shares of the pool per second."""
    parts: dict[str, float] = {}
    """What each layer wants, -1..1 of the slew limit: `base` and `residual` add up, `recovery`
    overrides them."""
    held: str | None = None
    """Why the committed split is held; None = it is not."""
    observation: Observation | None = None
    """What the policy saw; None = it sees nothing."""


class AllocationController(Protocol):
    """Decides on the target of the boundary; the engine asks at every step."""

    @property
    def stops_refill(self) -> bool:
        """Whether nothing is to be loaded in the background now."""
        ...

    @property
    def latest(self) -> Decision | None:
        """Of the last query; None = there was none yet."""
        ...

    @property
    def num_queries(self) -> int:
        """Times that a policy was asked."""
        ...

    @property
    def num_holds(self) -> int:
        """Queries that ended in holding the committed split."""
        ...

    @property
    def num_recoveries(self) -> int:
        """Bursts that were taken for such."""
        ...

    def decide(
        self, now: float, committed: float, observe: Callable[[float], Observation]
    ) -> float:
        """The target as of now: EMB's share of the pages, 0..1.

        Args:
            now: engine clock, seconds; never goes back.
            committed: the split as it is.
            observe: makes the observation of a moment; called only when a policy is asked.
        """
        ...


class Policy(Protocol):
    """Says how the split is to change, once in a control period."""

    def rate(self, observation: Observation) -> float:
        """Share of the slew limit, -1..1; above 0 = EMB grows."""
        ...


class StaticController:
    """One split for ever; `static:0.4`."""

    def __init__(self, emb_fraction: float) -> None:
        """Takes EMB's share of the pages.

        Raises:
            ValueError: not within 0..1.
        """
        if not 0.0 <= emb_fraction <= 1.0:
            raise ValueError(f"controller: static:X needs X within 0..1, not {emb_fraction}")
        self.emb_fraction = emb_fraction
        self.stops_refill = False
        self.latest: Decision | None = None
        self.num_queries = self.num_holds = self.num_recoveries = 0

    def decide(
        self, now: float, committed: float, observe: Callable[[float], Observation]
    ) -> float:
        """That split; it observes nothing."""
        if self.latest is None:
            self.latest = Decision(now, self.emb_fraction, committed)
        return self.emb_fraction


class AdaptiveController:
    """Integrates the rate of a policy, within the bounds and the slew limit."""

    def __init__(
        self,
        policy: Policy,
        config: ControllerConfig | None = None,
        recovery: BurstRecovery | None = None,
        residual: ResidualAdapter | None = None,
    ) -> None:
        """Takes the policy, its bounds, what overrides it in a burst, what corrects it online."""
        self._policy = policy
        self._residual = residual
        self._config = config or ControllerConfig()
        self._recovery = recovery
        self._rate = 0.0
        """Shares of the pool per second."""
        self._target: float | None = None
        self._reached = 0.0
        self._due = 0.0
        self._valid_until = 0.0
        self._is_complained_of = False
        self.stops_refill = False
        self.latest: Decision | None = None
        self.num_queries = self.num_holds = 0

    @property
    def num_recoveries(self) -> int:
        """Bursts that were taken for such."""
        return 0 if self._recovery is None else self._recovery.num_fired

    def decide(
        self, now: float, committed: float, observe: Callable[[float], Observation]
    ) -> float:
        """See `AllocationController.decide`."""
        if self._target is None:
            self._target, self._reached, self._due = committed, now, now
        if self._rate:
            self._integrate(self._target, now, committed)
        self._reached = now
        if now >= self._due:
            # On a grid: a query that comes late does not delay the next ones.
            period = self._config.period_s
            self._due += period
            if self._due <= now:
                self._due = now + period
            self._valid_until = now + _VALID_PERIODS * period
            self._query(now, self._target, committed, observe)
        return self._target

    def _integrate(self, target: float, now: float, committed: float) -> None:
        """Moves the target by what the rate has made since the last call.

        A start beyond the bounds moves inwards only. Pages that cannot follow, as those in flight
        or below a floor, do not let the target run away by more than the slew of one period.
        """
        config = self._config
        seconds = min(now, self._valid_until) - self._reached
        if seconds <= 0.0:
            return
        moved = target + self._rate * seconds
        reach = config.slew_per_s * config.period_s
        if self._rate > 0.0:
            limit = max(target, min(config.largest_share, committed + reach))
            self._target = min(moved, limit)
        else:
            limit = min(target, max(config.least_share, committed - reach))
            self._target = max(moved, limit)

    def _query(
        self, now: float, target: float, committed: float, observe: Callable[[float], Observation]
    ) -> None:
        self.num_queries += 1
        observation: Observation | None = None
        parts: dict[str, float] = {}
        try:
            observation = observe(now)
            held = self._ask(observation, target, parts)
        except Exception as error:
            # Whatever a policy trips over (a damaged file, a bug), requests are served on.
            held = f"the policy failed: {type(error).__name__}: {error}"
            logger.debug("the policy failed", exc_info=True)
        if held is not None:
            self._hold(held, committed)
        else:
            wanted = parts.get("recovery", parts["base"] + parts.get("residual", 0.0))
            self._rate = min(1.0, max(-1.0, wanted)) * self._config.slew_per_s
            self._is_complained_of = False
        recovery = self._recovery
        self.stops_refill = held is None and recovery is not None and recovery.stops_refill
        kept = target if held is None else committed
        self.latest = Decision(now, kept, committed, self._rate, parts, held, observation)

    def _ask(self, observation: Observation, target: float, parts: dict[str, float]) -> str | None:
        """Asks policy and recovery; returns why neither is to be followed, if so."""
        if not observation.is_finite:
            return "the observation is not a number"
        if observation.age_s > STALE_S or not observation.num_requests:
            return "no request has ended lately"
        parts["base"] = self._policy.rate(observation)
        if not isfinite(parts["base"]):
            return "the policy did not return a number"
        wanted = parts["base"]
        if self._residual is not None:
            parts["residual"] = self._residual.rate(observation)
            wanted += parts["residual"]
            if not isfinite(wanted):
                self._residual.reset()
                return "the residual adapter did not return a number"
            wanted = min(1.0, max(-1.0, wanted))
        if self._recovery is not None:
            num_fired = self._recovery.num_fired
            parts["recovery"] = self._recovery.rate(observation, wanted, target, self._config)
            if self._residual is not None and self._recovery.num_fired != num_fired:
                self._residual.reset()
        return None

    def _hold(self, reason: str, committed: float) -> None:
        """Stays where the pool is, and says so once until a policy is followed again."""
        self.num_holds += 1
        self._rate, self._target = 0.0, committed
        if not self._is_complained_of:
            is_idle = reason.startswith("no request")
            level = logging.INFO if is_idle else logging.WARNING
            logger.log(level, "the split is held at %.3f: %s", committed, reason)
            self._is_complained_of = True

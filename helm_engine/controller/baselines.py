"""Policies to be measured against: rules of thumb, a hill climber, and what a page is worth.

Each sees the same observations at the same times under the same slew limit. What they know of the
future is nothing; yardsticks in hindsight belong to the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from helm_engine.controller.observation import Observation, balance

STEPS = (1 / 3, 2 / 3, 1.0)
"""Sizes of a move, in shares of the slew limit: with both signs and 0, the learned policy's."""


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """Gives to the tenant whose hit rate is further below its mark, once latency is a worry."""

    kv_mark: float = 0.8
    """KV hit rate that is good enough."""
    emb_mark: float = 0.9
    worry: float = 0.8
    """P99 in service levels below which nothing is done."""
    dead_zone: float = 0.05
    """Differences of hit rates that do not count."""

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`."""
        if observation.p99_over_slo < self.worry:
            return 0.0
        kv_lacks = max(0.0, self.kv_mark - observation.kv_hit_rate)
        emb_lacks = max(0.0, self.emb_mark - observation.emb_hit_rate)
        difference = emb_lacks - kv_lacks
        if abs(difference) <= self.dead_zone:
            return 0.0
        return STEPS[0] if difference > 0.0 else -STEPS[0]


class HillClimbPolicy:
    """Tries a move, waits until it shows, goes on where P99 fell and turns round where it rose.

    It uses the steps of the learned policy: larger ones while P99 falls, the smallest after it
    rose. Where a move changed nothing it rests, then tries the other way.
    """

    def __init__(
        self, settle_s: float = 5.0, rest_s: float = 15.0, tolerance: float = 0.03
    ) -> None:
        """Takes how long a move needs to show and how long a rest is.

        Args:
            settle_s: seconds from a move to the look at what became of it.
            rest_s: seconds from there to the next move, where it changed nothing.
            tolerance: share by which P99 may differ without having changed.
        """
        self._settle_s = settle_s
        self._rest_s = rest_s
        self._tolerance = tolerance
        self._direction = 1.0
        self._size = 0
        self._before: float | None = None
        """P99 before the move that is looked at next; None = the next call begins a new climb."""
        self._not_before = 0.0

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`."""
        now, p99 = observation.now, observation.p99_over_slo
        if now < self._not_before:
            return 0.0
        before = self._before
        if before is not None:
            if abs(p99 - before) <= self._tolerance * before:
                self._size, self._direction = 0, -self._direction
                self._before, self._not_before = None, now + self._rest_s
                return 0.0
            if p99 < before:
                self._size = min(self._size + 1, len(STEPS) - 1)
            else:
                self._size, self._direction = 0, -self._direction
        self._before, self._not_before = p99, now + self._settle_s
        return self._direction * STEPS[self._size]


@dataclass(frozen=True, slots=True)
class MarginalPolicy:
    """Equalises the milliseconds saved per page: a page goes to whom it saves more.

    The rate is in proportion to the balance of what one tenant would gain and the other lose.
    """

    dead_zone: float = 0.05
    """A balance that is not worth a move: refill and evictions cost too."""
    full_at: float = 0.5
    """The balance at which the slew limit is used up."""

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`; 0 without a cost profile."""
        to_emb = balance(observation.emb_page_gain_ms, observation.kv_page_loss_ms)
        to_kv = balance(observation.kv_page_gain_ms, observation.emb_page_loss_ms)
        # Both at once only where the estimates are noise: then the larger one, by its lead.
        wanted = max(0.0, to_emb) - max(0.0, to_kv)
        if abs(wanted) <= self.dead_zone:
            return 0.0
        return max(-1.0, min(1.0, wanted / self.full_at))


@dataclass(frozen=True, slots=True)
class MillisecondsPerBytePolicy:
    """One queue for both tenants, as far as a target can say it.

    FASTLIBRA (arXiv 2505.03756) keeps LoRA adapters and KV in one pool and evicts whatever saves
    least per byte. Pages are of one size here, so that queue would always take the page whose loss
    costs least and knows no gain, no dead zone and no proportion: full speed to whoever has more
    to lose, within the slew limit. The order of eviction within a tenant stays the tenant's own.
    """

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`; 0 without a cost profile."""
        kv, emb = observation.kv_page_loss_ms, observation.emb_page_loss_ms
        return float(emb > kv) - float(kv > emb)


@dataclass(frozen=True, slots=True)
class SetPointPolicy:
    """Looks at one tenant's hit rate alone: gives it what it needs for a mark, and no more."""

    is_kv: bool
    mark: float
    dead_zone: float = 0.02
    full_at: float = 0.3
    """The distance from the mark at which the slew limit is used up."""

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`."""
        found = observation.kv_hit_rate if self.is_kv else observation.emb_hit_rate
        lacks = self.mark - found
        if abs(lacks) <= self.dead_zone:
            return 0.0
        share = max(-1.0, min(1.0, lacks / self.full_at))
        return -share if self.is_kv else share

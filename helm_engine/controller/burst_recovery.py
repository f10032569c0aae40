"""What overrides a policy while a burst lasts: protect what is dear, load nothing, hand back.

It fires when P99 exceeds its moving average by three sigma, or when arrivals jump. For a while it
tilts the split half-way towards the tenant whose pages are worth more and keeps refill off the
link; then the policy gets its say back in stages. It ends on its own after `longest_s`, with
whatever P99 is then as the new usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation

_TAIL = 0.01
"""Of the requests, those above P99."""


@dataclass(frozen=True, slots=True)
class BurstConfig:
    """When a burst is taken for one, and for how long."""

    sigmas: float = 3.0
    """P99 above its average by so many of its standard deviations."""
    least_sigma: float = 0.05
    """Of the average: P99 of calm traffic wavers so much whatever was seen of it."""
    tail_sigmas: float = 5.0
    """More requests than one in a hundred are above the average P99, by so many standard
    deviations of a Poisson number. It is the same test for latencies of every shape, while P99 of
    few requests or of a heavy tail exceeds three sigma every few minutes."""
    average_s: float = 60.0
    """Seconds after which a P99 counts 1 / e in the average."""
    settle_s: float = 45.0
    """Nothing fires before so much was seen."""
    jump: float = 1.5
    """Arrivals above the usual rate by this factor,"""
    jump_sigmas: float = 6.0
    """and by so many standard deviations."""
    half_way: float = 0.5
    """Part of the way to the bound that the split is tilted; a full move that arrives late loses
    more than it gains."""
    shortest_s: float = 5.0
    longest_s: float = 30.0
    """Of the override."""
    stage_s: float = 5.0
    """Of each stage of the return."""
    stages: tuple[float, ...] = (1 / 3, 2 / 3)
    """What the policy's rate counts in each."""


class BurstRecovery:
    """Calm, override, stages of the return; asked as often as the policy."""

    def __init__(self, config: BurstConfig | None = None) -> None:
        """Begins calm and knowing nothing."""
        self._config = config or BurstConfig()
        self._average = 0.0
        self._variance = 0.0
        self._seen_s = 0.0
        self._asked: float | None = None
        self._stage_since = 0.0
        self._goal: float | None = None
        self.num_fired = 0
        self.stage = 0
        """0 = calm, 1 = the policy is overridden, above = so far on the way back."""

    @property
    def stops_refill(self) -> bool:
        """Whether the link belongs to running requests alone."""
        return self.stage == 1

    def rate(
        self, observation: Observation, base: float, target: float, bounds: ControllerConfig
    ) -> float:
        """What becomes of the policy's rate (-1..1 of the slew limit).

        Args:
            observation: an engine that has answered something lately.
            base: the policy's own.
            target: of the split, as of now.
            bounds: the slew limit, the period and the bounds of the split.
        """
        config, now = self._config, observation.now
        elapsed = 0.0 if self._asked is None else max(0.0, now - self._asked)
        self._asked = now
        if self.stage == 0 and self._is_burst(observation):
            self._fire(observation, bounds)
        if self.stage == 0:
            self._learn(observation.p99_ms, elapsed)
            return base
        passed = now - self._stage_since
        if self.stage == 1:
            if not self._is_over(observation, passed):
                return self._tilt(target, bounds)
            if passed >= config.longest_s:
                self._average, self._variance = observation.p99_ms, 0.0
            self.stage, self._stage_since = 2, now
        elif passed >= config.stage_s:
            self.stage, self._stage_since = self.stage + 1, now
        if self.stage - 2 >= len(config.stages):
            self.stage = 0
            return base
        return base * config.stages[self.stage - 2]

    def _sigma(self) -> float:
        """Milliseconds that P99 wavers without a reason."""
        return max(sqrt(self._variance), self._config.least_sigma * self._average)

    def _is_burst(self, observation: Observation) -> bool:
        if self._seen_s < self._config.settle_s:
            return False
        limit = self._average + self._config.sigmas * self._sigma()
        is_slow = observation.p99_ms > limit
        return (is_slow and self._has_tail(observation)) or self._is_jump(observation)

    def _has_tail(self, observation: Observation) -> bool:
        """Whether so many requests are slower than P99 was that it is no accident.

        A faded sum of n requests varies as half of a Poisson number of mean 2 n, and the root of
        such a number has the variance 1/4 (Anscombe, Biometrika 1948).
        """
        share = _share_above(self._average / observation.slo_ms, observation)
        seen, expected = (2.0 * observation.num_requests * one + 0.375 for one in (share, _TAIL))
        return 2.0 * (sqrt(seen) - sqrt(expected)) > self._config.tail_sigmas

    def _is_jump(self, observation: Observation) -> bool:
        config = self._config
        is_much = observation.arrival_jump > config.jump
        return is_much and observation.arrival_jump_sigmas > config.jump_sigmas

    def _is_over(self, observation: Observation, passed: float) -> bool:
        """Whether what made it fire is gone, or has become the usual."""
        config = self._config
        if passed >= config.longest_s:
            return True
        if passed < config.shortest_s:
            return False
        calm = self._average + 0.5 * config.sigmas * self._sigma()
        return observation.p99_ms <= calm and not self._is_jump(observation)

    def _fire(self, observation: Observation, bounds: ControllerConfig) -> None:
        self.num_fired += 1
        self.stage, self._stage_since = 1, observation.now
        self._goal = None
        protects_kv = self._protects_kv(observation)
        if protects_kv is not None:
            start = observation.emb_fraction
            # A split that is beyond a bound is not brought back for it.
            low, high = min(start, bounds.least_share), max(start, bounds.largest_share)
            bound = low if protects_kv else high
            self._goal = start + self._config.half_way * (bound - start)

    def _protects_kv(self, observation: Observation) -> bool | None:
        """Whether KV is the tenant to protect; None = neither is worth more.

        Without a cost profile nobody knows what misses cost: then, as in the paper, KV where many
        users come back soon.
        """
        kv, emb = observation.kv_page_loss_ms, observation.emb_page_loss_ms
        if kv == emb:
            return observation.hot_user_share >= 0.5 if not kv else None
        return kv > emb

    def _tilt(self, target: float, bounds: ControllerConfig) -> float:
        if self._goal is None:
            return 0.0
        full = (self._goal - target) / (bounds.slew_per_s * bounds.period_s)
        return min(1.0, max(-1.0, full))

    def _learn(self, p99_ms: float, elapsed: float) -> None:
        """Follows the usual P99 and how much it wavers, by exponential averages."""
        self._seen_s += elapsed
        if self._seen_s <= 0.0:
            self._average = p99_ms
            return
        # At first a plain mean, so that the first value is not overrated.
        share = max(1.0 - exp(-elapsed / self._config.average_s), elapsed / self._seen_s)
        difference = p99_ms - self._average
        self._average += share * difference
        self._variance = (1.0 - share) * (self._variance + share * difference * difference)


def _share_above(level: float, observation: Observation) -> float:
    """Share of requests slower than a level (in service levels), between the known quantiles."""
    slower, share = observation.p99_over_slo, _TAIL
    for quantile, above in (
        (observation.p95_over_slo, 0.05),
        (observation.p90_over_slo, 0.1),
        (observation.p50_over_slo, 0.5),
    ):
        if level >= quantile:
            width = slower - quantile
            part = max(0.0, slower - level) / width if width > 0.0 else 0.0
            return share + part * (above - share)
        slower, share = quantile, above
    return share

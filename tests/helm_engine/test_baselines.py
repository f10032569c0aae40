"""Each baseline on observations made by hand, and the layer that overrides them in a burst."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.baselines import (
    STEPS,
    HillClimbPolicy,
    MarginalPolicy,
    MillisecondsPerBytePolicy,
    SetPointPolicy,
    ThresholdPolicy,
)
from helm_engine.controller.burst_recovery import BurstConfig, BurstRecovery
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.controller.observation_collector import ObservationCollector
from helm_engine.request import RequestStatus
from tests.helm_engine.test_scheduler import Simulation, make_request

SEEN = Observation(
    num_requests=500.0, slo_ms=80.0, emb_fraction=0.5, p99_over_slo=1.0, num_pages=1000
)


def slower(factor: float) -> dict[str, float]:
    """All latencies are larger."""
    return {
        "p50_over_slo": 0.4 * factor,
        "p90_over_slo": 0.6 * factor,
        "p95_over_slo": 0.8 * factor,
        "p99_over_slo": factor,
    }


BOUNDS = ControllerConfig(period_s=1.0)


@pytest.mark.parametrize(
    ("kv_hits", "emb_hits", "p99", "rate"),
    [
        (0.8, 0.5, 1.0, STEPS[0]),
        (0.4, 0.9, 1.0, -STEPS[0]),
        (0.4, 0.9, 0.7, 0.0),  # Nobody is late: nothing to mend.
        (0.7, 0.8, 1.0, 0.0),  # Both lack as much.
        (0.95, 0.99, 3.0, 0.0),  # Neither lacks anything.
    ],
)
def test_threshold(kv_hits: float, emb_hits: float, p99: float, rate: float) -> None:
    seen = replace(SEEN, kv_hit_rate=kv_hits, emb_hit_rate=emb_hits, p99_over_slo=p99)
    assert ThresholdPolicy().rate(seen) == rate


@pytest.mark.parametrize(
    ("is_kv", "hits", "rate"),
    [
        (True, 0.5, -1.0),
        (True, 0.75, -0.5),
        (True, 0.9, 0.0),
        (True, 0.99, 0.3),
        (False, 0.75, 0.5),
        (False, 0.99, -0.3),
        (False, 0.1, 1.0),
    ],
)
def test_set_points_look_at_one_tenant_alone(is_kv: bool, hits: float, rate: float) -> None:
    policy = SetPointPolicy(is_kv=is_kv, mark=0.9)
    own, other = ("kv_hit_rate", "emb_hit_rate") if is_kv else ("emb_hit_rate", "kv_hit_rate")
    for others in (0.0, 1.0):
        seen = replace(SEEN, **{own: hits, other: others})
        assert policy.rate(seen) == pytest.approx(rate)


def worth(kv: tuple[float, float], emb: tuple[float, float]) -> Observation:
    """What a page more and a page less is worth to each."""
    return replace(
        SEEN,
        kv_page_gain_ms=kv[0],
        kv_page_loss_ms=kv[1],
        emb_page_gain_ms=emb[0],
        emb_page_loss_ms=emb[1],
    )


@pytest.mark.parametrize(
    ("kv", "emb", "marginal", "per_byte"),
    [
        ((3.0, 4.0), (0.5, 1.0), -1.0, -1.0),
        ((1.5, 1.6), (0.9, 1.0), -0.4, -1.0),
        ((0.1, 0.2), (0.6, 0.7), 1.0, 1.0),
        ((1.0, 1.1), (1.0, 1.1), 0.0, 0.0),  # Equal: what one gains the other loses.
        ((1.0, 1.2), (1.0, 1.1), 0.0, -1.0),  # One queue knows no gain and never rests.
        ((0.0, 0.0), (0.0, 0.0), 0.0, 0.0),  # No cost profile.
    ],
)
def test_what_a_page_is_worth(
    kv: tuple[float, float], emb: tuple[float, float], marginal: float, per_byte: float
) -> None:
    assert MarginalPolicy().rate(worth(kv, emb)) == pytest.approx(marginal)
    assert MillisecondsPerBytePolicy().rate(worth(kv, emb)) == per_byte


@pytest.mark.parametrize("best", [0.25, 0.5, 0.8])
def test_hill_climb_finds_the_valley_on_the_learned_policys_steps(best: float) -> None:
    controller = AdaptiveController(HillClimbPolicy(), BOUNDS)
    split, rates, late = 0.5, set(), []
    for now in np.arange(0.0, 400.0, 0.25).tolist():
        seen = replace(SEEN, p99_over_slo=0.5 + 4.0 * abs(split - best), now=now)
        split = controller.decide(now, split, lambda _, seen=seen: seen)  # type: ignore[misc]
        assert controller.latest is not None
        rates.add(round(controller.latest.parts["base"], 6))
        late += [split] if now > 200.0 else []
    allowed = {0.0, *(round(sign * one, 6) for one in STEPS for sign in (1, -1))}
    assert rates <= allowed
    assert abs(np.mean(late) - best) < 0.1


def test_hill_climb_looks_only_once_a_move_can_show() -> None:
    policy = HillClimbPolicy(settle_s=5.0, rest_s=15.0)
    rates = [policy.rate(replace(SEEN, now=float(now))) for now in range(22)]
    # A probe, the same P99 after 5 seconds, a rest of 15, and a probe the other way.
    assert rates == [STEPS[0], *[0.0] * 19, -STEPS[0], 0.0]


# ---------------------------------------------------------------- bursts


class GrowsLate:
    """A policy at rest, until it would grow EMB for ever."""

    def rate(self, observation: Observation) -> float:
        return 0.6 if observation.now >= 50.0 else 0.0


def after_calm(config: BurstConfig | None = None) -> BurstRecovery:
    recovery = BurstRecovery(config)
    for now in range(60):
        rate = recovery.rate(replace(SEEN, **slower(1.0), now=float(now)), 0.6, 0.5, BOUNDS)
        assert (rate, recovery.stage, recovery.stops_refill) == (0.6, 0, False)
    return recovery


@pytest.mark.parametrize(
    ("burst", "fires"),
    [
        (slower(1.5), True),
        (slower(1.1), False),
        ({**slower(1.0), "p99_over_slo": 3.0, "num_requests": 50.0}, False),  # An outlier of few.
        ({**slower(3.0), "num_requests": 50.0}, True),
        ({"arrival_jump": 2.0, "arrival_jump_sigmas": 8.0}, True),
        ({"arrival_jump": 1.2, "arrival_jump_sigmas": 8.0}, False),
        ({"arrival_jump": 3.0, "arrival_jump_sigmas": 3.0}, False),
    ],
)
def test_what_is_taken_for_a_burst(burst: dict[str, float], fires: bool) -> None:
    recovery = after_calm()
    recovery.rate(replace(SEEN, **{**slower(1.0), **burst}, now=60.0), 0.6, 0.5, BOUNDS)
    assert (recovery.num_fired, recovery.stops_refill) == (int(fires), fires)


@pytest.mark.parametrize(
    ("changes", "goal"),
    [
        ({"kv_page_loss_ms": 2.0, "emb_page_loss_ms": 1.0}, 0.3),
        ({"kv_page_loss_ms": 1.0, "emb_page_loss_ms": 2.0}, 0.7),
        ({"kv_page_loss_ms": 1.0, "emb_page_loss_ms": 1.0}, 0.5),
        ({"hot_user_share": 0.8}, 0.3),  # Without costs: KV where users come back.
        ({"hot_user_share": 0.2}, 0.7),
    ],
)
def test_a_burst_is_answered_half_way_and_handed_back_in_stages(
    changes: dict[str, float], goal: float
) -> None:
    controller = AdaptiveController(GrowsLate(), BOUNDS, BurstRecovery())
    split, stages, during = 0.5, [], 0.0
    for now in range(100):
        p99 = 3.0 if 50 <= now < 60 else 1.0
        seen = replace(SEEN, **slower(p99), **changes, emb_fraction=split, now=float(now))
        target = controller.decide(float(now), split, lambda _, seen=seen: seen)  # type: ignore[misc]
        split = target
        during = split if now == 60 else during
        decision = controller.latest
        assert decision is not None
        stages.append(round(decision.parts["recovery"], 3))
        assert controller.stops_refill == (50 <= now < 60)
    assert during == pytest.approx(goal)
    assert stages[:50] == [0.0] * 50
    # A third and two thirds of the policy's own rate, five seconds each; then all of it.
    assert stages[60:71] == [0.2] * 5 + [0.4] * 5 + [0.6]
    assert controller.num_recoveries == 1


def test_it_ends_on_its_own_where_the_burst_does_not() -> None:
    recovery = after_calm()
    rates = []
    for now in range(60, 200):
        seen = replace(SEEN, now=float(now), **slower(5.0), hot_user_share=0.9)
        rates.append(recovery.rate(seen, 0.6, 0.5, BOUNDS))
    # 30 s and two stages of 5 s; then that is the usual, and nothing fires again.
    assert rates[40:] == [0.6] * 100
    assert (recovery.num_fired, recovery.stage) == (1, 0)


def fired_at(
    rate: float, shape: float, seed: int, seconds: int, slow: float, many: float
) -> list[int]:
    """Seconds at which Poisson arrivals with log-normal latencies are taken for a burst.

    In the last ten, latencies are `slow` and arrivals `many` times what they were.
    """
    rng = np.random.default_rng(seed)
    collector = ObservationCollector(Simulation().scheduler, 80.0, 0.0)
    recovery = BurstRecovery()
    request = make_request("r", 3)
    request.status, request.user_tag = RequestStatus.FINISHED, 1
    found: list[int] = []
    for second in range(seconds):
        bursts = second >= seconds - 10
        number = int(rng.poisson(rate * (many if bursts else 1.0)))
        ends = np.sort(second + rng.random(number))
        latencies = (slow if bursts else 1.0) * np.exp(rng.normal(-3.0, shape, number))
        for end, latency in zip(ends.tolist(), latencies.tolist(), strict=True):
            request.arrival = end - latency
            request.first_scheduled = end
            collector.observe_arrival(end)
            collector.observe_ended([request], end)
        seen = collector.observe(second + 1.0)
        if seen.num_requests:
            recovery.rate(seen, 0.0, 0.5, BOUNDS)
        found += [second] * (recovery.num_fired - len(found))
    return found


@pytest.mark.parametrize(("rate", "shape"), [(10.0, 0.5), (60.0, 0.8), (60.0, 0.25)])
def test_an_hour_of_steady_traffic_is_no_burst(rate: float, shape: float) -> None:
    assert len(fired_at(rate, shape, seed=4, seconds=3600, slow=1.0, many=1.0)) <= 1


@pytest.mark.parametrize(("slow", "many"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
@pytest.mark.parametrize("rate", [20.0, 100.0])
def test_a_burst_is_noticed_within_seconds(rate: float, slow: float, many: float) -> None:
    (second,) = fired_at(rate, 0.4, seed=5, seconds=120, slow=slow, many=many)
    assert 110 <= second <= 113

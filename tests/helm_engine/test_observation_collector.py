"""What a controller sees against a slow reference that keeps everything and weighs it anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helm_engine.controller.decayed_window import (
    BINS_PER_DOUBLING,
    FIRST_SUM,
    NUM_BINS,
    bin_of,
    decayed_window,
    quantiles,
    weight,
)
from helm_engine.controller.observation_collector import ObservationCollector, WindowConfig
from helm_engine.exceptions import DeadlineExceededError, RequestAbortedError
from helm_engine.request import Request, RequestStatus
from model_executor.step import StepTimings
from tests.helm_engine.test_scheduler import Simulation, make_request

SLO_MS = 20.0
WINDOWS = WindowConfig(mean_s=1.5, arrivals_s=2.0, long_arrivals_s=20.0, hot_s=3.0)


@dataclass
class Reference:
    """Every event with its time; means are worked out from the definition."""

    ended: list[tuple[float, Request]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    totals: list[tuple[float, ...]] = field(default_factory=list)

    def weights(self, now: float) -> np.ndarray:
        return np.array([exp((at - now) / WINDOWS.mean_s) for at, _ in self.ended])

    def mean(self, now: float, values: list[float]) -> float:
        return float(np.average(values, weights=self.weights(now)))

    def latencies(self) -> list[float]:
        return [(at - request.arrival) * 1e3 for at, request in self.ended]

    def p99(self, now: float) -> float:
        order = np.argsort(self.latencies())
        sums = np.cumsum(self.weights(now)[order])
        return float(np.array(self.latencies())[order][np.searchsorted(sums, 0.99 * sums[-1])])

    def hot(self) -> list[float]:
        found = []
        for place, (_, request) in enumerate(self.ended):
            before = [
                one.arrival for _, one in self.ended[:place] if one.user_tag == request.user_tag
            ]
            is_hot = bool(before) and request.arrival - before[-1] <= WINDOWS.hot_s
            found.append(float(is_hot and request.user_tag != 0))
        return found

    def rate(self, now: float, window: float) -> float:
        total = sum(exp((at - now) / window) for at in self.arrivals)
        return total / (window * (1 - exp(-now / window)))


def play(seed: int, seconds: float) -> tuple[ObservationCollector, Reference, float]:
    """Requests that come, wait, run, fail and are withdrawn, and totals that rise meanwhile."""
    rng = np.random.default_rng(seed)
    simulation = Simulation()
    stats = simulation.scheduler.stats
    collector = ObservationCollector(simulation.scheduler, SLO_MS, 0.0, WINDOWS)
    reference = Reference()
    now, number = 0.0, 0
    while now < seconds:
        now += float(rng.exponential(0.05))
        batch = []
        for _ in range(int(rng.poisson(2.0))):
            waits, runs = rng.exponential(0.004), rng.lognormal(-5.0, 0.7)
            request = make_request(
                str(number), int(rng.integers(1, 300)), arrival=now - waits - runs
            )
            number += 1
            request.user_tag = int(rng.integers(0, 8))
            request.first_scheduled = now - runs
            request.status, request.finished_at = RequestStatus.FINISHED, now
            if rng.random() < 0.1:
                request.status = RequestStatus.FAILED
                is_withdrawn = rng.random() < 0.5
                kind = RequestAbortedError if is_withdrawn else DeadlineExceededError
                request.error = kind("ended")
            batch.append(request)
            collector.observe_arrival(request.arrival)
            reference.arrivals.append(request.arrival)
        collector.observe_ended(batch, now)
        kept = [one for one in batch if not isinstance(one.error, RequestAbortedError)]
        reference.ended += [(now, one) for one in kept]
        added = [int(one) for one in rng.integers(0, 50, 4)]
        stats.prefix_queries += added[0] + added[1]
        stats.prefix_hits += added[1]
        stats.row_queries += added[2] + added[3]
        stats.row_hits += added[3]
        spent = [float(one) for one in rng.exponential(5.0, 3)]
        stats.add_times(StepTimings(*spent))
        sums = added[0] + added[1], added[1], added[2] + added[3], added[3]
        reference.totals.append((now, *sums, *spent))
        collector.observe(now)  # Takes over the totals.
    return collector, reference, now


@pytest.mark.parametrize(("seed", "seconds"), [(1, 3.0), (2, 30.0), (3, 120.0)])
def test_every_figure_is_that_of_the_slow_reference(seed: int, seconds: float) -> None:
    collector, reference, now = play(seed, seconds)
    now += 0.3
    seen = collector.observe(now)
    requests = [request for _, request in reference.ended]
    assert seen.num_requests == pytest.approx(reference.weights(now).sum())
    assert seen.mean_latency_ms == pytest.approx(reference.mean(now, reference.latencies()))
    late = [
        float(one.error is not None or ms > SLO_MS)
        for one, ms in zip(requests, reference.latencies(), strict=True)
    ]
    assert seen.slo_violation_rate == pytest.approx(reference.mean(now, late))
    tokens = [float(one.num_tokens) for one in requests]
    assert seen.mean_history_tokens == pytest.approx(reference.mean(now, tokens))
    waits = [((one.first_scheduled or 0.0) - one.arrival) * 1e3 for one in requests]
    assert seen.queue_delay_ms == pytest.approx(reference.mean(now, waits))
    assert seen.hot_user_share == pytest.approx(reference.mean(now, reference.hot()))
    bin_width = 2 ** (1 / BINS_PER_DOUBLING)
    assert 1 / bin_width <= seen.p99_ms / reference.p99(now) <= bin_width
    totals = np.array(reference.totals)
    faded = np.exp((totals[:, :1] - now) / WINDOWS.mean_s) * totals[:, 1:]
    context, reused, looked_up, found, *spent = faded.sum(axis=0)
    assert seen.kv_hit_rate == pytest.approx(reused / context)
    assert seen.emb_hit_rate == pytest.approx(found / looked_up)
    passed = WINDOWS.mean_s * (1 - exp(-now / WINDOWS.mean_s))
    assert seen.foreground_bytes_per_s == pytest.approx((looked_up - found) / passed * 256)
    busy = [seen.load_busy, seen.prefill_busy, seen.score_busy]
    assert busy == pytest.approx([one / passed / 1e3 for one in spent])
    rates = [reference.rate(now, one) for one in (WINDOWS.arrivals_s, WINDOWS.long_arrivals_s)]
    assert seen.arrival_rate == pytest.approx(rates[0])
    assert seen.arrival_jump == pytest.approx(rates[0] / rates[1])
    sums = [sqrt(2 * WINDOWS.arrivals_s * one + 0.375) for one in rates]
    assert seen.arrival_jump_sigmas == pytest.approx(2 * (sums[0] - sums[1]))
    assert seen.age_s == pytest.approx(now - reference.ended[-1][0])
    assert (seen.now, seen.slo_ms, seen.is_finite) == (now, SLO_MS, True)


def test_what_is_seen_of_the_pool_is_the_pools_own() -> None:
    simulation = Simulation(emb_fraction=0.5)
    scheduler = simulation.scheduler
    collector = ObservationCollector(scheduler, SLO_MS, 0.0)
    scheduler.boundary.set_target(0.25)
    seen = collector.observe(1.0)
    assert seen.emb_fraction == scheduler.pool.committed
    assert seen.target_lag == pytest.approx(0.25 - scheduler.pool.committed)
    assert seen.num_pages == scheduler.pool.num_pages
    assert (seen.p99_ms, seen.num_requests, seen.arrival_jump, seen.age_s) == (0.0, 0.0, 1.0, 1.0)


def test_memory_does_not_grow_with_users_or_requests() -> None:
    collector = ObservationCollector(
        Simulation().scheduler, SLO_MS, 0.0, WindowConfig(max_users=100)
    )
    for number in range(1000):
        request = make_request("r", 3, arrival=0.0)
        request.user_tag = number + 1
        request.status = RequestStatus.FINISHED
        collector.observe_ended([request], 0.01)
    assert len(collector._last_visit) == 100


def quantiles_of(bins: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    found: np.ndarray = quantiles(bins, NUM_BINS - 1, bins.sum(), shares)
    return found


def test_a_window_outlives_a_long_silence() -> None:
    window = decayed_window(1.0, NUM_BINS, 0.0)
    for at in (0.0, 1e6, 1e9):
        value = weight(window, at)
        window[FIRST_SUM + bin_of(at / 1e6 + 1.0)] += value
        assert window[FIRST_SUM:].sum() / weight(window, at) == pytest.approx(1.0)
    assert quantiles_of(window[FIRST_SUM:], (0.5,)) == pytest.approx(1001.0, rel=0.05)


def test_an_arrival_after_a_long_silence_counts() -> None:
    collector = ObservationCollector(Simulation().scheduler, SLO_MS, 0.0, WINDOWS)
    collector.observe_arrival(1.0)
    collector.observe_arrival(1000.0)
    assert collector.observe(1000.0).arrival_rate == pytest.approx(1 / WINDOWS.arrivals_s)


@pytest.mark.parametrize("milliseconds", [0.0, 0.003, 0.01, 1.0, 80.0, 1e5, 1e9])
def test_a_quantile_of_one_value_is_in_its_bin(milliseconds: float) -> None:
    bins = np.zeros(NUM_BINS)
    bins[bin_of(milliseconds)] += 2.5
    expected = min(max(milliseconds, 0.01), 0.01 * 2**24)
    assert 1 / 1.045 <= quantiles_of(bins, (0.99,))[0] / expected <= 1.045


SHARES = (0.99, 0.95, 0.9, 0.5)


@given(st.lists(st.tuples(st.floats(0.01, 1e5), st.floats(1e-3, 1e3)), min_size=1, max_size=60))
def test_quantiles_are_in_the_bins_of_the_exact_ones(values: list[tuple[float, float]]) -> None:
    bins = np.zeros(NUM_BINS)
    for milliseconds, amount in values:
        bins[bin_of(milliseconds)] += amount
    ordered = sorted(values)
    reached = np.cumsum([amount for _, amount in ordered])
    for share, found in zip(SHARES, quantiles_of(bins, SHARES), strict=True):
        # Where a share is reached exactly, the next value is as good.
        low, high = np.searchsorted(reached, np.array([-1e-9, 1e-9]) + share * reached[-1])
        assert ordered[low][0] / 1.045 <= found
        assert found <= ordered[min(high, len(ordered) - 1)][0] * 1.045


def test_nothing_has_no_quantiles() -> None:
    assert quantiles_of(np.zeros(NUM_BINS), SHARES).tolist() == [0.0] * 4

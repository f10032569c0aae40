"""Engines behind routers in virtual time: nothing is lost, added, or known before its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helm_engine.config import SchedulerConfig
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.cluster import (
    Cluster,
    ClusterModel,
    simulate_cluster,
    spread_fractions,
    work_of,
)
from helm_engine.simulator.cluster_result import ClusterResult
from helm_engine.simulator.cluster_workload import cluster_workload
from helm_engine.simulator.simulation import EngineModel, Result, simulate
from helm_engine.simulator.trace import Trace, make_trace
from router.policies import POLICIES
from router.prefix_index import hash_keys
from tests.simulator.small import PROFILE, regime, workload

RESULT_ARRAYS = (
    "latencies_ms", "cached_tokens", "rows_requested", "rows_resident", "service_ms",
)  # fmt: skip


def small_trace(engines: int = 3, seed: int = 2, scale: int = 1, **changes: Any) -> Trace:
    """A few hundred requests for so many engines, whose pools hold a part of what is asked."""
    laws = workload(
        regime(seconds=3.0),
        regime(name="second", seconds=3.0, ramp_s=1.0, load=1.5, hot_user_share=0.1),
        warm_up_s=1.0,
        **({"pool_bytes": 1 << 20} | changes),
    )
    return make_trace(cluster_workload(laws, engines), seed, scale=scale)


def cluster_of(trace: Trace, engines: int = 3, **changes: Any) -> ClusterModel:
    engine = EngineModel(trace.setting, PROFILE, scale=trace.scale)
    return ClusterModel(engine, spread_fractions(engines, 0.5, 0.6), **changes)


def assert_same(one: Result, other: Result) -> None:
    for name in RESULT_ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name, column in one.steps.items():
        np.testing.assert_array_equal(column, other.steps[name])
    assert one.num_pages == other.num_pages
    assert one.num_moved_pages == other.num_moved_pages


# ---------------------------------------------------------------- against the simulator


@pytest.mark.parametrize("controller", [None, "marginal", "helm"])
@pytest.mark.parametrize("scale", [1, 4])
def test_one_engine_behind_a_router_is_that_engine(controller: str | None, scale: int) -> None:
    trace = small_trace(engines=1, scale=scale)
    engine = replace(
        EngineModel(trace.setting, PROFILE, scale=scale),
        controller=ControllerConfig(name=controller),
    )
    routed = simulate_cluster(trace, ClusterModel(engine, (0.3,)))
    assert_same(routed.result, simulate(trace, engine, 0.3))
    assert (routed.engine_of == 0).all()


def test_one_engine_behind_a_router_follows_the_same_schedule() -> None:
    trace = small_trace(engines=1)
    engine = EngineModel(trace.setting, PROFILE)
    schedule = [(1.5, 0.7), (4.0, 0.2), (100.0, 0.5)]
    routed = simulate_cluster(trace, ClusterModel(engine, (0.3,)), schedule)
    assert_same(routed.result, simulate(trace, engine, 0.3, schedule))


def test_every_engine_does_what_it_would_do_alone_with_its_requests() -> None:
    trace = small_trace()
    model = cluster_of(trace, policy="least_load", routers=2)
    together = simulate_cluster(trace, model)
    for engine, share in enumerate(model.emb_fractions):
        mine = np.flatnonzero(together.engine_of == engine)
        alone = simulate(part_of(trace, mine), model.engine, share)
        for name in RESULT_ARRAYS:
            np.testing.assert_array_equal(
                getattr(together.result, name)[mine], getattr(alone, name)
            )


def part_of(trace: Trace, places: np.ndarray) -> Trace:
    """Some requests of a trace, at their times."""
    sizes = np.diff(trace.candidate_bounds)[places]
    candidates = [
        trace.candidates[trace.candidate_bounds[one] : trace.candidate_bounds[one + 1]]
        for one in places
    ]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    cuts = [
        [*trace._cuts[place][:3], *bounds[number : number + 2].tolist(), trace._cuts[place][5]]
        for number, place in enumerate(places.tolist())
    ]
    return replace(
        trace,
        arrivals=trace.arrivals[places],
        regimes=trace.regimes[places],
        people=trace.people[places],
        lengths=trace.lengths[places],
        candidates=np.concatenate(candidates),
        candidate_bounds=bounds,
        _cuts=cuts,
    )


# ---------------------------------------------------------------- conservation


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=st.sampled_from([*POLICIES]),
    engines=st.integers(1, 5),
    routers=st.integers(1, 3),
    staleness_s=st.sampled_from([0.0, 0.1, 2.0]),
    load=st.sampled_from([20.0, 400.0]),
    seed=st.integers(0, 1 << 16),
)
def test_every_request_ends_once_where_it_was_sent(
    policy: str, engines: int, routers: int, staleness_s: float, load: float, seed: int
) -> None:
    trace = small_trace(engines, seed, requests_per_s=load)
    scheduler = SchedulerConfig(max_num_seqs=4, max_num_waiting=6)
    engine = EngineModel(trace.setting, PROFILE, scheduler)
    model = ClusterModel(
        engine, spread_fractions(engines, 0.5, 0.4), policy, routers, staleness_s, seed
    )
    cluster = Watched(trace, model)
    result = cluster.run()
    assert cluster.ends == Counter(str(place) for place in range(len(trace)))
    latencies = result.result.latencies_ms
    assert np.isnan(latencies).sum() == len(cluster.refusals)
    for place, sent_to in enumerate(result.engine_of.tolist()):
        spent = [
            place_of.place
            for place_of in cluster.seats
            if place_of.engine.log.service_ms.get(str(place), 0.0) > 0.0
        ]
        assert spent == ([] if np.isnan(latencies[place]) else [sent_to])
    for router in cluster.routers:
        assert not router.registry.queue_ms().any()
        for name in model.engine_names:
            assert router.registry.num_outstanding(name) == 0


class Watched(Cluster):
    """Counts how requests end."""

    def __init__(self, trace: Trace, model: ClusterModel) -> None:
        super().__init__(trace, model)
        self.ends: Counter[str] = Counter()
        self.refusals: list[str] = []

    def ended(self, request: Any, now: float) -> None:
        assert now >= request.arrival
        self.ends[request.request_id] += 1
        super().ended(request, now)

    def refused(self, request: Any, error: Any) -> None:
        self.ends[request.request_id] += 1
        self.refusals.append(request.request_id)
        super().refused(request, error)


# ---------------------------------------------------------------- what routers know, and when


class Checked(Cluster):
    """Compares what routers know of an engine with the truth, whenever they are told."""

    num_checks = 0

    def _tell(self, seat: Any, *told: Any) -> None:
        super()._tell(seat, *told)
        for router in self.routers:
            check_residency(router.residency, seat)
        self.num_checks += 1


def check_residency(residency: Any, seat: Any) -> None:
    """The index has every block as often, and every row, that the engine has, and no other."""
    scheduler, slot = seat.engine.scheduler, residency.slots[seat.name]
    held = Counter(hash_keys([bytes(one) for one in scheduler.kv.pool.cached_hashes()]).tolist())
    for key in held:
        blocks = residency.cached_blocks_of_keys(np.array([key]))
        assert blocks[slot] == 1
    assert residency.num_blocks(seat.name) == len(held)
    slots = scheduler.emb.slot_of_row
    cached = np.zeros(len(residency.slots), dtype=np.int64)
    none = np.empty(0, dtype=np.int64)
    resident, absent = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
    assert residency.rows_missing(none, resident, cached)[slot] == 0
    assert residency.rows_missing(none, absent, cached)[slot] == len(absent)
    assert residency.num_row_positions(seat.name) == len(resident)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 16), scale=st.sampled_from([1, 4]), routers=st.integers(1, 2))
def test_without_staleness_routers_know_the_truth_after_every_event(
    seed: int, scale: int, routers: int
) -> None:
    trace = small_trace(2, seed, scale, pool_bytes=1 << 19)
    engine = EngineModel(
        trace.setting, PROFILE, controller=ControllerConfig(name="marginal"), scale=scale
    )
    model = ClusterModel(engine, (0.2, 0.7), routers=routers, staleness_s=0.0)
    cluster = Checked(trace, model)
    cluster.run()
    assert cluster.num_checks > 100


@pytest.mark.parametrize("staleness_s", [0.1, 3.0])
def test_what_was_published_is_known_late_and_in_the_end(staleness_s: float) -> None:
    trace = small_trace()
    cluster = Late(trace, cluster_of(trace, staleness_s=staleness_s, routers=2))
    cluster.run()
    assert len(cluster.told_at) > 100
    for published, now in cluster.told_at:
        assert now >= published + staleness_s
    for router in cluster.routers:
        for seat in cluster.seats:
            check_residency(router.residency, seat)


class Late(Cluster):
    """Notes at which time of the cluster a message is delivered, and when it was published."""

    now = 0.0

    def __init__(self, trace: Trace, model: ClusterModel) -> None:
        super().__init__(trace, model)
        self.told_at: list[tuple[float, float]] = []

    def request(self, place: int, when: float) -> None:
        super().request(place, when)
        assert when >= self.now
        self.now = when

    def _pass_time(self, when: float) -> None:
        self.now = when
        super()._pass_time(when)

    def _tell(self, seat: Any, batches: Any, *more: Any) -> None:
        for batch in batches:
            if batch is not None:
                self.told_at.append((batch.ts, self.now))
        super()._tell(seat, batches, *more)


# ---------------------------------------------------------------- symmetry and seeds


def run(trace: Trace, **changes: Any) -> ClusterResult:
    return simulate_cluster(trace, cluster_of(trace, **changes))


@pytest.mark.parametrize("policy", ["joint", "kv", "emb", "least_load"])
def test_names_of_engines_mean_nothing(policy: str) -> None:
    trace = small_trace()
    one = run(trace, policy=policy, names=("a", "b", "c"), staleness_s=0.05)
    other = run(trace, policy=policy, names=("zebra", "b", "0"), staleness_s=0.05)
    np.testing.assert_array_equal(one.engine_of, other.engine_of)
    assert_same(one.result, other.result)


@pytest.mark.parametrize("policy", [*POLICIES])
def test_the_same_seed_gives_the_same_result(policy: str) -> None:
    trace = small_trace()
    one, same = (run(trace, policy=policy, routers=2, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.engine_of, same.engine_of)
    np.testing.assert_array_equal(one.router_of, same.router_of)
    np.testing.assert_array_equal(one.predicted_ms, same.predicted_ms)
    assert_same(one.result, same.result)


def test_another_seed_deals_other_requests_to_routers() -> None:
    trace = small_trace()
    one, other = (run(trace, routers=2, seed=seed).router_of for seed in (1, 2))
    assert (one != other).any()
    for dealt in (one, other):
        assert 0.3 < dealt.mean() < 0.7


def test_joint_finds_what_least_load_does_not_look_for() -> None:
    trace = small_trace(engines=4)
    joint, least = (run(trace, engines=4, policy=name) for name in ("joint", "least_load"))
    assert joint.result.cached_tokens.sum() > 1.2 * least.result.cached_tokens.sum()
    assert least.load_spread < 2.0


def test_a_lone_router_expects_what_comes() -> None:
    """At low load a request is alone on its engine, and its price is what it takes."""
    trace = small_trace(requests_per_s=0.5, pool_bytes=4 << 20)
    result = run(trace, staleness_s=0.0)
    np.testing.assert_allclose(np.median(result.predicted_over_actual), 1.0, atol=0.05)


def test_several_routers_hear_of_each_others_requests_from_engines() -> None:
    trace = small_trace(requests_per_s=120.0)
    cluster = Cluster(trace, cluster_of(trace, policy="least_load", routers=3, staleness_s=0.0))
    heard = 0.0
    for place, when in enumerate(trace.arrivals.tolist()):
        cluster.request(place, when)
        for router in cluster.routers:
            queue_ms = router.registry.queue_ms()
            heard = max(heard, float(queue_ms.max()))
    cluster.finish()
    assert heard > 0.0
    for router in cluster.routers:
        assert not router.registry.queue_ms().any()


# ---------------------------------------------------------------- how it is asked for


def test_a_clusters_workload_is_that_many_engines_share() -> None:
    one = workload(regime(first_hot_user=50, ramp_s=0.0), regime(name="r", ramp_s=2.0))
    four = cluster_workload(one, 4, pace=2.0)
    setting, larger = one.resolved_setting, four.resolved_setting
    assert larger.requests_per_s == 4 * setting.requests_per_s
    assert larger.num_users == 4 * setting.num_users
    assert four.warm_up_s == one.warm_up_s / 2
    for before, after in zip(one.regimes, four.regimes, strict=True):
        assert after.hot_users == 4 * before.hot_users
        assert after.first_hot_user == 4 * before.first_hot_user
        assert (after.seconds, after.ramp_s) == (before.seconds / 2, before.ramp_s / 2)
        assert after.candidates == before.candidates
    assert cluster_workload(one, 1).regimes == one.regimes


@pytest.mark.parametrize(
    ("engines", "pace", "named"),
    [(0, 1.0, "engines"), (1 << 20, 1.0, "num_users"), (2, 0.0, "pace")],
)
def test_a_workload_that_cannot_be_enlarged_is_refused(
    engines: int, pace: float, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        cluster_workload(workload(), engines, pace)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"emb_fractions": ()}, "engines"),
        ({"routers": 0}, "routers"),
        ({"staleness_s": -0.1}, "staleness_s"),
        ({"staleness_s": float("nan")}, "staleness_s"),
        ({"names": ("a", "a", "b")}, "names"),
        ({"names": ("a", "b")}, "names"),
        ({"policy": "magic"}, "policy"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_named(changes: dict[str, Any], named: str) -> None:
    trace = small_trace()
    with pytest.raises(ValueError, match=named):
        simulate_cluster(trace, replace(cluster_of(trace), **changes))


def test_shares_are_spread_evenly() -> None:
    np.testing.assert_allclose(spread_fractions(5, 0.5, 0.8), [0.1, 0.3, 0.5, 0.7, 0.9])
    assert spread_fractions(1, 0.4, 0.8) == (0.4,)
    with pytest.raises(ValueError, match="emb_fraction"):
        spread_fractions(3, 0.2, 0.6)


@pytest.mark.parametrize("scale", [1, 4])
def test_routers_see_of_a_request_what_its_engine_may_reuse(scale: int) -> None:
    trace = small_trace(scale=scale)
    block_tokens = trace.setting.block_tokens
    for place in range(0, len(trace), 7):
        request = trace.request(place)
        work = work_of(request, block_tokens)
        reusable = len(work.block_hashes) * work.block_tokens
        full = request.num_tokens // block_tokens * block_tokens
        assert full - len(work.block_hashes) < reusable <= full or not work.block_hashes
        assert work.num_tokens == len(work.rows)

"""An engine of fewer pages and rows that stand for more: the same requests, much the same hits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_manager.block_pool import BlockPool
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.page_value import PageValueEstimator
from helm_engine.config import SchedulerConfig
from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.engine_control import EngineControl
from helm_engine.controller.observation import Observation
from helm_engine.request import Request
from helm_engine.simulator.figures import figures
from helm_engine.simulator.open_loop import VirtualTimer, offer
from helm_engine.simulator.scaling import (
    SCALES,
    CoarseHistory,
    CoarseKV,
    coarse_hashes,
    coarse_history,
    sampled_rows,
)
from helm_engine.simulator.simulation import (
    EngineModel,
    Ledger,
    Result,
    SimulatedEngine,
    simulate,
)
from helm_engine.simulator.trace import Trace, make_trace
from helm_engine.simulator.workloads import Workload
from model_executor.step import NO_ROW
from tests.simulator.small import PROFILE, regime, setting, workload

SCALE = 4


def busy() -> Workload:
    """Room for about half of the regulars' KV, and for a part of the rows."""
    laws = regime(seconds=60.0, hot_users=60, hot_user_share=0.9, history_mean=150)
    return workload(laws, pool_bytes=2_400_000, num_items=24_000, max_history=400)


def run(scale: int, emb_fraction: float, seed: int = 1, controller: str | None = None) -> Result:
    trace = make_trace(busy(), seed, scale=scale)
    config = ControllerConfig(name=controller)
    model = EngineModel(trace.setting, PROFILE, controller=config, scale=scale)
    return simulate(trace, model, emb_fraction)


def requests_of(trace: Trace) -> list[tuple[float, Callable[[], Request]]]:
    return [(at, partial(trace.request, place)) for place, at in enumerate(trace.arrivals.tolist())]


# ---------------------------------------------------------------- what is sampled


@pytest.mark.parametrize("scale", SCALES)
def test_one_row_in_so_many_is_sampled_of_every_rank(scale: int) -> None:
    laws = setting(num_items=128 * 300, num_categories=128)
    numbers, number = sampled_rows(laws, scale)
    chosen = numbers != NO_ROW
    assert number == chosen.sum() == laws.num_items // scale
    np.testing.assert_array_equal(numbers[chosen], np.arange(number))
    per_rank = chosen.reshape(128, 300).sum(axis=0)
    assert (per_rank == 128 // scale).all()
    per_category = chosen.reshape(128, 300).sum(axis=1)
    assert abs(per_category - 300 / scale).max() < 5 * np.sqrt(300 / scale) + 1


@pytest.mark.parametrize("scale", SCALES[1:])
def test_a_trace_at_a_scale_is_the_same_trace_with_fewer_rows(scale: int) -> None:
    full, thin = make_trace(workload(), 3), make_trace(workload(), 3, scale=scale)
    for name in ("arrivals", "regimes", "people", "lengths", "event_bounds"):
        np.testing.assert_array_equal(getattr(full, name), getattr(thin, name))
    assert full.user_tags == thin.user_tags
    numbers, _ = sampled_rows(full.setting, scale)
    for number in range(0, len(full), 7):
        theirs, mine = full.tokens(number), thin.tokens(number)
        np.testing.assert_array_equal(numbers[theirs.rows], mine.rows)
        # Micro-batches may cut anywhere: the order of candidates is the trace's own.
        assert sorted(numbers[theirs.candidate_rows]) == sorted(mine.candidate_rows)


def test_other_scales_are_refused_and_must_be_the_engines() -> None:
    for wrong in (0, 3, 128, -2):
        with pytest.raises(ValueError, match="scale: must be a power of two from 1 to 64"):
            make_trace(workload(), 1, scale=wrong)
        with pytest.raises(ValueError, match="scale: must be a power of two from 1 to 64"):
            EngineModel(setting(), PROFILE, scale=wrong)
    trace = make_trace(workload(), 1, scale=2)
    with pytest.raises(ValueError, match="scale: the trace was drawn for 2, the engine is at 4"):
        simulate(trace, EngineModel(setting(), PROFILE, scale=4), 0.3)


# ---------------------------------------------------------------- histories


@given(
    scale=st.sampled_from(SCALES[1:]),
    visits=st.lists(st.integers(1, 2000), min_size=1, max_size=6).map(sorted),
    person=st.integers(0, 10_000),
)
def test_a_history_that_is_never_evicted_is_reused_as_at_full_scale(
    scale: int, visits: list[int], person: int
) -> None:
    """Block for block: what rounding to coarse blocks takes away is given back."""
    pages = 2 + 2000 // (8 * scale)
    kv = CoarseKV(BlockPool(np.arange(pages + 1), pages + 1), 8, scale)
    (hashes,) = coarse_hashes(np.array([2000]), [b"0123456789abcdef"], 8, scale)
    before = 0
    for number, length in enumerate(visits):
        history = coarse_history(hashes, person, length, 8, scale)
        assert kv.allocate(f"{number}", history, length, length) == before // 8 * 8
        kv.cache_blocks(f"{number}", history, length, 1)
        kv.free(f"{number}")
        kv.check_integrity()
        before = length


@given(scale=st.sampled_from(SCALES[1:]), length=st.integers(1, 3000))
def test_people_together_take_their_blocks_over_the_scale(scale: int, length: int) -> None:
    num_people = 64 * scale
    taken = [_history(person, length, scale) for person in range(num_people)]
    wanted = -(-length // 16) * 64
    assert sum(one.num_pages for one in taken) == pytest.approx(wanted, rel=0.02, abs=2)
    assert sum(map(len, taken)) == pytest.approx(length // 16 * 64, rel=0.02, abs=2)
    assert all(0 <= one.num_pages - len(one) <= 1 for one in taken)


def _history(person: int, length: int, scale: int) -> CoarseHistory:
    (hashes,) = coarse_hashes(np.array([length]), [b"0123456789abcdef"], 16, scale)
    return coarse_history(hashes, person, length, 16, scale)


# ---------------------------------------------------------------- the engine


def test_without_a_scale_nothing_of_it_is_there() -> None:
    trace = make_trace(workload(), 1)
    assert trace.scale == 1
    assert type(trace.request(0).block_hashes) is list
    config = ControllerConfig(name="marginal")
    engine = SimulatedEngine(EngineModel(trace.setting, PROFILE, controller=config), 0.3)
    assert type(engine.scheduler.kv) is KVCacheManager
    assert type(engine.scheduler.page_values) is PageValueEstimator
    assert engine.scheduler.emb.num_rows == trace.setting.num_items


def test_the_engines_geometry_shrinks_and_its_bytes_do_not() -> None:
    model = EngineModel(setting(pool_bytes=64 << 20), PROFILE, SchedulerConfig(256))
    full, small = model.layout(0.3), replace(model, scale=16).layout(0.3)
    assert small.rows_per_page == full.rows_per_page
    assert small.page_bytes == 16 * full.page_bytes
    assert small.num_pages == full.num_pages // 16
    assert small.num_emb_pages == pytest.approx(full.num_emb_pages / 16, abs=1)
    assert small.staging_bytes == full.staging_bytes
    assert small.min_kv_pages - 1 == -(-(full.min_kv_pages - 1) // 16)


@pytest.mark.parametrize("emb_fraction", [0.2, 0.5, 0.8])
def test_hit_rates_and_work_are_those_of_the_full_engine(emb_fraction: float) -> None:
    """Within two points, of an engine of a few hundred pages; docs/simulator.md has larger ones."""
    full, small = run(1, emb_fraction), run(SCALE, emb_fraction)
    ours, theirs = figures(small), figures(full)
    assert ours.requests == theirs.requests
    assert ours.failed == theirs.failed == 0
    assert ours.kv_hit_rate == pytest.approx(theirs.kv_hit_rate, abs=0.02)
    assert ours.emb_hit_rate == pytest.approx(theirs.emb_hit_rate, abs=0.02)
    assert ours.emb_fraction == pytest.approx(theirs.emb_fraction, abs=0.01)
    assert theirs.kv_hit_rate is not None
    assert 0.1 < theirs.kv_hit_rate < 0.9
    for column in ("tokens", "candidates", "rows", "missing_rows", "load_ms"):
        assert small.steps[column].sum() == pytest.approx(full.steps[column].sum(), rel=0.06)


def test_pages_and_rows_are_told_as_the_devices_own() -> None:
    full, small = run(1, 0.4), run(SCALE, 0.4)
    assert small.num_pages == pytest.approx(full.num_pages, abs=SCALE)
    assert small.steps["emb_pages"][0] == pytest.approx(full.steps["emb_pages"][0], abs=SCALE)
    mine, theirs = small.rows_requested.sum(), full.rows_requested.sum()
    assert mine == pytest.approx(theirs, rel=0.05)


def test_books_add_up_at_a_scale_while_the_boundary_moves() -> None:
    trace: Trace = make_trace(busy(), 2, scale=8)
    config = ControllerConfig(name="marginal")
    engine = SimulatedEngine(EngineModel(trace.setting, PROFILE, controller=config, scale=8), 0.3)
    check = engine.core.check_integrity
    ledger = Ledger(len(trace))
    every_second = [(float(second), check) for second in range(60)]
    timer = VirtualTimer(engine.clock)
    offer(engine.core, timer, requests_of(trace), ledger, every_second, drain=True)
    engine.core.check_nothing_leaked()
    assert not np.isnan(ledger.latencies_ms).any()
    assert engine.scheduler.boundary.num_moved_pages > 0


class Watching:
    """A policy that moves nothing."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def rate(self, observation: Observation) -> float:
        self.seen.append(observation)
        return 0.0

    def mean(self, name: str) -> float:
        """Of what was seen once caches were full."""
        return float(np.mean([getattr(one, name) for one in self.seen[20:]]))

    def worth(self, name: str) -> float:
        """Of a page, times the pages of the pool, as the vector has it."""
        return self.mean(name) * self.seen[0].num_pages


def watched(scale: int, emb_fraction: float) -> Watching:
    trace = make_trace(busy(), 1, scale=scale)
    # Any controller: what is there to be observed is set up for it.
    config = ControllerConfig(name="threshold")
    model = EngineModel(trace.setting, PROFILE, controller=config, scale=scale)
    engine, policy = SimulatedEngine(model, emb_fraction), Watching()
    controller = AdaptiveController(policy)
    engine.core.control = EngineControl(engine.scheduler, controller, trace.setting.slo_ms, 0.0)
    offer(engine.core, VirtualTimer(engine.clock), requests_of(trace), Ledger(len(trace)))
    return policy


def test_what_a_controller_sees_means_the_same() -> None:
    full, small = watched(1, 0.1), watched(SCALE, 0.1)
    assert len(small.seen) == len(full.seen) >= 60
    for name in ("arrival_rate", "hot_user_share", "mean_history_tokens", "num_requests"):
        assert small.mean(name) == pytest.approx(full.mean(name), rel=0.01)
    for name in ("kv_hit_rate", "emb_hit_rate", "emb_fraction"):
        assert small.mean(name) == pytest.approx(full.mean(name), abs=0.02)
    for name in ("foreground_bytes_per_s", "mean_latency_ms", "p99_over_slo"):
        assert small.mean(name) == pytest.approx(full.mean(name), rel=0.1)
    for name in ("kv_page_gain_ms", "kv_page_loss_ms"):
        assert small.worth(name) == pytest.approx(full.worth(name), rel=0.1)
    # At either scale the miniatures see a few hundred rows of this small table.
    for name in ("emb_page_gain_ms", "emb_page_loss_ms"):
        assert small.worth(name) == pytest.approx(full.worth(name), rel=0.5)

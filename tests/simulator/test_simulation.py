"""A trace in virtual time: the same hits as on a device, the same figures for the same seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from block_manager.pool_layout import PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, HostTierConfig, SchedulerConfig
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.protocol import parse_request
from helm_engine.simulator import figures
from helm_engine.simulator.open_loop import VirtualTimer, offer
from helm_engine.simulator.simulation import (
    EngineModel,
    Ledger,
    Result,
    SimulatedEngine,
    simulate,
)
from helm_engine.simulator.trace import Trace, make_trace
from model_executor.model_config import ModelConfig, parse_model_config
from tests.simulator.small import PROFILE, regime, setting, workload
from tests.toy_models import TOY_CONFIGS, write_toy_model

FREE = replace(
    PROFILE, step_ms=0.0, prefill_row_ms=0.0, candidate_ms=0.0, retrieval_ms=0.0, row_miss_ms=0.0
)
"""Every request is answered before the next one comes."""


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(workload(), 2)


def run(trace: Trace, emb_fraction: float = 0.3, *schedule: tuple[float, float]) -> Result:
    return simulate(trace, EngineModel(trace.setting, PROFILE), emb_fraction, schedule)


# ---------------------------------------------------------------- against a real engine

POOL_BYTES = 1 << 18
STEP_TOKENS = 128


def toy_ranking_model() -> ModelConfig:
    """Reads what a trace's requests say: one token for an event, positions from the oldest."""
    config: dict[str, Any] = {**TOY_CONFIGS["nvidia"], "num_items": 6000, "max_sequence_len": 200}
    del config["action"]
    return parse_model_config(config | {"scaling_seqlen": 230, "num_position_buckets": 201}, "toy")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    directory = write_toy_model(tmp_path_factory.mktemp("model") / "toy", toy_ranking_model())
    config = EngineConfig(
        directory,
        pool=PoolConfig(pool_bytes=POOL_BYTES, emb_fraction=0.4, block_tokens=8),
        scheduler=SchedulerConfig(max_num_batched_tokens=STEP_TOKENS),
        # When a refill is done is a matter of time, which differs.
        host_tier=HostTierConfig(refill_bytes_per_second=0),
        poison_freed_memory=True,
    )
    return load_engine(config, SystemClock())


def real_trace(real: LoadedEngine, key: bytes) -> Trace:
    model = real.served.model_config
    sizes = setting(
        row_bytes=4 * model.row_dim,
        kv_bytes_per_token=4 * model.kv_elements_per_token,
        pool_bytes=POOL_BYTES,
    )
    laws = workload(regime(seconds=8.0, hot_users=5), warm_up_s=2.0)
    return make_trace(laws, 4, setting=sizes, model_version=real.served.version, user_key=key)


def body(trace: Trace, number: int) -> dict[str, Any]:
    tokens = trace.tokens(number)
    return {
        "user": f"user-{trace.people[number]}",
        "history": {"item_ids": tokens.rows.tolist()},
        "candidates": {"item_ids": tokens.candidate_rows.tolist()},
    }


def test_tokens_and_hashes_are_those_of_the_front(real: LoadedEngine) -> None:
    trace = real_trace(real, b"key")
    processor = real.served.input_processor(b"key")
    for number in range(0, len(trace), 9):
        mine = trace.request(number)
        theirs = processor.process(parse_request(body(trace, number)), "r", 0.0).request
        assert mine.block_hashes == theirs.block_hashes
        assert mine.user_tag == theirs.user_tag
        for array in ("rows", "features", "candidate_rows", "candidate_features", "num_final"):
            np.testing.assert_array_equal(
                getattr(mine.tokens, array), getattr(theirs.tokens, array)
            )


def test_hits_are_those_of_a_real_engine_while_the_boundary_moves(real: LoadedEngine) -> None:
    """The model computes every request there, one after the other."""
    trace = real_trace(real, b"key")
    moves = {100: 0.1, 200: 0.6, 300: 0.3}
    model = EngineModel(
        trace.setting,
        FREE,
        real.served.config.scheduler,
        real.served.config.host_tier.refill,
    )
    assert model.layout(0.4) == real.served.layout
    # Between two requests there is time for all pages to move.
    slow = replace(trace, arrivals=np.arange(0.0, 0.5 * len(trace), 0.5))
    schedule = [(0.5 * place - 0.25, share) for place, share in moves.items()]
    simulated = simulate(slow, model, 0.4, schedule)
    processor, core = real.served.input_processor(b"key"), real.core
    found = []
    for number in range(len(trace)):
        if number in moves:
            core.set_target(moves[number])
            while core.has_background_work:
                core.step()
        request = processor.process(parse_request(body(trace, number)), f"{number}", 0.0).request
        core.add_request(request)
        assert core.run_until_idle() == [request]
        assert request.error is None
        found.append((request.cached_tokens, request.rows_requested, request.rows_resident))
    mine = [simulated.cached_tokens, simulated.rows_requested, simulated.rows_resident]
    np.testing.assert_array_equal(np.stack(mine, axis=1), found)
    stats, steps = core.scheduler.stats, simulated.steps
    assert steps["rows"].sum() == stats.row_queries
    assert (steps["rows"] - steps["missing_rows"]).sum() == stats.row_hits
    assert simulated.num_moved_pages == core.scheduler.boundary.num_moved_pages > 50
    for hits, queries in ((stats.prefix_hits, stats.prefix_queries), (mine[2], mine[1])):
        assert 0.1 < np.sum(hits) / np.sum(queries) < 0.9
    core.check_integrity()


# ---------------------------------------------------------------- figures


def test_the_same_trace_gives_the_same_result(trace: Trace) -> None:
    one, same, other = run(trace), run(trace), run(trace, 0.6)
    np.testing.assert_array_equal(one.latencies_ms, same.latencies_ms)
    for name, column in one.steps.items():
        np.testing.assert_array_equal(column, same.steps[name])
    assert (one.cached_tokens != other.cached_tokens).any()


def test_a_lone_request_takes_what_its_work_costs() -> None:
    trace = make_trace(workload(regime(seconds=1.0), warm_up_s=0.0, requests_per_s=1.0), 1)
    result = run(trace)
    for place in range(min(2, len(trace))):
        tokens = trace.tokens(place)
        if place and trace.arrivals[1] - trace.arrivals[0] < 0.1:
            break
        computed = len(tokens.rows) - result.cached_tokens[place]
        missing = result.rows_requested[place] - result.rows_resident[place]
        expected = 1.0 + 0.01 * computed + 0.001 * len(tokens.candidate_rows) + 0.02 * missing
        assert result.latencies_ms[place] == pytest.approx(expected)


def test_figures_are_those_of_the_requests_after_the_warm_up(trace: Trace) -> None:
    result = run(trace)
    all_of_it = figures.figures(result)
    mine = trace.arrivals >= 5.0
    latencies = result.latencies_ms[mine]
    assert all_of_it.requests == mine.sum() < len(trace)
    assert all_of_it.failed == 0
    assert all_of_it.p99_ms == pytest.approx(np.percentile(latencies, 99))
    assert all_of_it.slo_share == pytest.approx(float((latencies <= 20.0).mean()))
    assert all_of_it.kv_hit_rate == pytest.approx(
        result.cached_tokens[mine].sum() / trace.lengths[mine].sum()
    )
    assert all_of_it.emb_fraction == pytest.approx(0.3, abs=0.001)
    assert figures.figures_by_regime(result)[0].requests == all_of_it.requests


def test_a_queue_that_is_full_refuses_and_that_breaks_the_slo() -> None:
    trace = make_trace(workload(requests_per_s=2000.0), 1)
    model = EngineModel(trace.setting, PROFILE, SchedulerConfig(max_num_seqs=4, max_num_waiting=10))
    result = simulate(trace, model, 0.3)
    found = figures.figures(result)
    refused = np.isnan(result.latencies_ms[trace.arrivals >= 5.0])
    assert found.failed == refused.sum() > 0
    assert found.slo_share is not None
    assert found.slo_share <= 1 - found.failed / found.requests


def test_a_schedule_moves_the_boundary_when_it_says(trace: Trace) -> None:
    result = run(trace, 0.2, (10.0, 0.7), (20.0, 0.4))
    over_time = figures.fraction_over_time(result)
    seconds, committed = np.array(over_time["seconds"]), np.array(over_time["committed"])
    assert committed[seconds < 10.0] == pytest.approx(0.2, abs=0.001)
    assert committed[(seconds > 15.0) & (seconds < 20.0)] == pytest.approx(0.7, abs=0.001)
    assert committed[-1] == pytest.approx(0.4, abs=0.001)
    assert (np.diff(committed[seconds < 15.0]) >= 0).all()
    assert result.num_moved_pages == pytest.approx(0.8 * result.num_pages, abs=4)


def test_of_two_pools_the_larger_one_hits_more(trace: Trace) -> None:
    large = simulate(
        trace, EngineModel(setting(pool_bytes=16 << 20), PROFILE), 0.3
    ).cached_tokens.sum()
    small = simulate(
        trace, EngineModel(setting(pool_bytes=1 << 20), PROFILE), 0.3
    ).cached_tokens.sum()
    assert large > small


def test_refill_leaves_the_link_that_the_profile_implies_to_requests(trace: Trace) -> None:
    budget = EngineModel(trace.setting, PROFILE).refill_budget()
    assert budget.link_bytes_per_s == pytest.approx(64 / 20e-6)


def test_a_controller_moves_the_boundary_and_is_asked_at_rest_too() -> None:
    trace = make_trace(workload(requests_per_s=0.5), 1)
    static = EngineModel(trace.setting, PROFILE, controller=ControllerConfig(name="static:0.6"))
    moved = simulate(trace, static, 0.2)
    assert moved.steps["emb_pages"][-1] / moved.num_pages == pytest.approx(0.6, abs=0.001)
    asked = SimulatedEngine(
        EngineModel(trace.setting, PROFILE, controller=ControllerConfig(name="threshold")), 0.2
    )
    requests = [(2.0, lambda: trace.request(0)), (30.0, lambda: trace.request(1))]
    offer(asked.core, VirtualTimer(asked.clock), requests, Ledger(len(trace)))
    assert asked.core.control is not None
    assert asked.core.control.controller.num_queries >= 28  # Once a second.

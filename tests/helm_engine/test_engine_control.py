"""A controller in an engine: in virtual time, over the real scheduler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.page_value import PROFILES, Size
from benchmarks.priced_replay import BLOCK_TOKENS, ROWS_PER_PAGE, Replay, traced_visits
from block_manager.page_value import PageValueEstimator, SamplingConfig
from block_manager.refill import HostTraffic
from block_manager.reuse_distance import PageCosts
from helm_engine.config import EngineConfig
from helm_engine.controller.allocation_controller import StaticController
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.engine_control import EngineControl, build_control
from helm_engine.controller.registry import make_controller
from helm_engine.datasets.returning_users import ReturningUsersConfig
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import ControllerActiveError
from helm_engine.recommender import Recommender
from tests.helm_engine.test_scheduler import Simulation, make_request
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

FAST = ControllerConfig(name="marginal", period_s=0.25)


def controlled(name: str, emb_pages: int, num_rows: int, tmp_path: Path) -> Replay:
    """An engine of 2,000 pages in virtual time that knows its costs and has a controller."""
    profile = PROFILES["slow_tier"]
    replay = Replay(2000 - emb_pages, emb_pages, num_rows, profile)
    scheduler = replay.scheduler
    scheduler.page_values = PageValueEstimator(
        scheduler.pool.num_pages,
        ROWS_PER_PAGE,
        BLOCK_TOKENS,
        num_rows,
        PageCosts(profile.prefill_row_ms, profile.attention_pair_ms, profile.row_miss_ms),
        SamplingConfig(user_share=1.0, row_share=1.0, window_s=2.0),
    )
    config = replace(FAST, name=name, decision_log=tmp_path / f"{name}.jsonl")
    replay.core.control = build_control(config, scheduler, replay.clock.now())
    return replay


def visits(size: Size, p_return: float, num_visits: int):  # type: ignore[no-untyped-def]  # noqa: ANN201
    config = ReturningUsersConfig(
        num_users=size.users,
        num_items=size.items,
        num_categories=20,
        item_zipf=0.8,
        first_history=size.history,
        new_events=10,
        max_history=size.max_history,
        num_candidates=size.candidates,
        p_return=p_return,
        recent_users=size.users / 10,
        seed=7,
    )
    return traced_visits(config, num_visits, size.visits_per_s)


KV_HEAVY = Size(users=300, items=1500, warm_visits=0, visits=0, splits={}, max_history=320)
"""Histories that take 4,000 pages and come again and again, over rows that fit into 47."""
EMB_HEAVY = Size(users=100_000, items=80_000, warm_visits=0, visits=0, splits={}, max_history=320)
"""Users who do not come again, over rows that take 2,500 pages."""


@pytest.mark.parametrize("name", ["marginal", "ms_per_byte", "marginal+recovery"])
def test_the_boundary_moves_to_the_tenant_that_saves_more(name: str, tmp_path: Path) -> None:
    kv_heavy = controlled(name, 1000, KV_HEAVY.items, tmp_path)
    kv_heavy.play(visits(KV_HEAVY, 0.5, 1200))
    assert kv_heavy.scheduler.pool.committed < 0.25
    emb_heavy = controlled(name, 600, EMB_HEAVY.items, tmp_path)
    emb_heavy.play(visits(EMB_HEAVY, 0.0, 1200))
    assert emb_heavy.scheduler.pool.committed > 0.6
    for replay in (kv_heavy, emb_heavy):
        assert 0.1 <= replay.scheduler.pool.committed <= 0.9
        replay.core.check_integrity()


def test_every_decision_is_written_down(tmp_path: Path) -> None:
    replay = controlled("marginal", 1000, KV_HEAVY.items, tmp_path)
    replay.play(visits(KV_HEAVY, 0.5, 400))
    lines = [json.loads(line) for line in (tmp_path / "marginal.jsonl").read_text().splitlines()]
    control = replay.core.control
    assert control is not None
    assert len(lines) == control.controller.num_queries >= 6
    times = [line["at"] for line in lines]
    assert np.diff(times) == pytest.approx(0.25, abs=0.1)
    last = lines[-1]
    assert last["held"] is None
    assert last["rate"] == pytest.approx(last["parts"]["base"] * FAST.slew_per_s)
    assert last["observation"]["kv_hit_rate"] > 0.0
    # Before anything has ended nothing is known, and that is said.
    assert lines[0]["held"] == "no request has ended lately"
    stats = EngineStats.of(replay.scheduler, HostTraffic(), control).controller
    assert (stats.rate, stats.base_rate) == (last["rate"], last["parts"]["base"])
    assert (stats.queries, stats.holds) == (len(lines), control.controller.num_holds)
    assert stats.p99_ms == pytest.approx(
        last["observation"]["p99_over_slo"] * last["observation"]["slo_ms"]
    )


def test_two_controllers_over_the_same_trace_decide_alike(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        replay = controlled("hill_climb", 1000, KV_HEAVY.items, tmp_path / name)
        replay.play(visits(KV_HEAVY, 0.5, 300))
    first, second = (
        (tmp_path / one / "hill_climb.jsonl").read_text() for one in ("first", "second")
    )
    assert first == second


def test_while_a_controller_decides_nobody_else_does() -> None:
    simulation = Simulation(emb_fraction=0.5)
    scheduler = simulation.scheduler
    control = EngineControl(scheduler, make_controller("static:0.25"), slo_ms=50.0, now=0.0)
    simulation.core.control = control
    simulation.core.add_request(make_request("r"))
    simulation.drain()
    assert scheduler.boundary.target == 0.25
    with pytest.raises(ControllerActiveError, match="--controller"):
        simulation.core.set_target(0.5)
    assert scheduler.boundary.target == 0.25


@pytest.mark.parametrize("stops", [True, False])
def test_refill_rests_as_long_as_the_controller_says_so(stops: bool) -> None:
    simulation = Simulation(emb_fraction=0.1)
    core, controller = simulation.core, StaticController(0.1)
    core.control = EngineControl(simulation.scheduler, controller, 50.0, 0.0)
    controller.stops_refill = stops
    for visit in range(3):
        for number in range(12):
            core.add_request(make_request(f"r{number}", 300 + visit))
        simulation.drain()
    controller.emb_fraction = 0.6
    for _ in range(200):
        simulation.clock.advance(0.01)
        core.step()
    assert simulation.scheduler.boundary.committed > 0.5
    assert any(step.refill is not None for step in simulation.executor.steps) is not stops
    assert simulation.scheduler.refills.is_suspended is stops


def test_an_engine_is_configured_with_a_controller(tmp_path: Path) -> None:
    config = toy_engine_config(write_toy_model(tmp_path / "toy", toy_config()), num_pages=60)
    config = replace(config, controller=ControllerConfig(name="static:0.5"))
    made = Recommender.from_config(config)
    made.recommend({"history": {"item_ids": [3, 1, 4], "timestamps": [1, 2, 3]}})
    boundary = made.engine.core.scheduler.boundary
    assert boundary.target == 0.5
    with pytest.raises(ControllerActiveError):
        made.set_target(0.1)
    with pytest.raises(ValueError, match="controller: 'best' is unknown"):
        replace(config, controller=ControllerConfig(name="best"))
    with pytest.raises(ValueError, match="controller: marginal needs cost_profile"):
        EngineConfig(tmp_path, controller=ControllerConfig(name="marginal"))
    unwritable = ControllerConfig(name="static:0.5", decision_log=tmp_path / "no" / "log")
    with pytest.raises(ValueError, match=r"decision_log: .*cannot be written"):
        Recommender.from_config(replace(config, controller=unwritable))

"""What would have been best: against brute force, and under the limits that controllers have."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.figures import figures
from helm_engine.simulator.hindsight import Case, Effort, p99_ms
from helm_engine.simulator.oracle import WINDOW_S, WindowCosts, cost_by_window, window_costs
from helm_engine.simulator.schedule import Schedule, ScheduleFamily, constant
from helm_engine.simulator.workloads import Workload
from helm_engine.simulator.yardsticks import YARDSTICKS, find_yardstick
from tests.simulator.small import PROFILE, regime, workload

EFFORT = Effort(search_scale=1, coarse_step=5, evaluations=10)
BOUNDS = ControllerConfig(least_share=0.2, largest_share=0.6)
POOL = 2_400_000
LAWS: dict[str, Any] = {"seconds": 15.0, "hot_users": 60, "history_mean": 150}


def two_kinds() -> Workload:
    """Regulars whose KV fills the pool, then passers-by who need rows, and regulars again."""
    regulars = regime(**LAWS, hot_user_share=0.95)
    passing = regime(**LAWS, name="passing", hot_user_share=0.0, candidates=150, ramp_s=4.0)
    back = regime(**LAWS, name="back", hot_user_share=0.95)
    return workload(regulars, passing, back, pool_bytes=POOL, num_items=24_000, max_history=400)


def one_kind() -> Workload:
    return workload(regime(**LAWS, hot_user_share=0.8), pool_bytes=POOL, num_items=24_000)


@cache
def case(kinds: int) -> Case:
    return Case(two_kinds() if kinds == 2 else one_kind(), PROFILE, seed=3, config=BOUNDS)


@cache
def found(name: str, kinds: int) -> Schedule:
    return find_yardstick(name, case(kinds), EFFORT)


@cache
def costs(kinds: int) -> WindowCosts:
    return window_costs(case(kinds), EFFORT)


def p99_of(schedule: Schedule, kinds: int) -> float:
    value = figures(case(kinds).run(schedule, 1)).p99_ms
    assert value is not None
    return value


# ---------------------------------------------------------------- the best static share


def test_the_grid_is_that_of_the_bounds_and_floors() -> None:
    mine = Case(two_kinds(), PROFILE, seed=3)
    np.testing.assert_allclose(case(2).grid(), np.arange(0.2, 0.61, 0.02))
    np.testing.assert_allclose(case(2).grid(6), [0.2, 0.32, 0.44, 0.56, 0.6])
    tight = Case(workload(regime(), pool_bytes=250_000), PROFILE, seed=3)
    reached = [tight.reached(share, 1) for share in tight.grid()]
    assert len(set(reached)) == len(reached)
    assert tight.grid()[-1] < 0.9
    assert {*tight.grid(10)} < {*tight.grid()}
    assert reached[-1] == tight.reached(0.9, 1) < 0.9
    assert (mine.grid()[0], mine.grid()[-1]) == (0.1, 0.9)


@pytest.mark.parametrize("kinds", [1, 2])
def test_the_best_static_share_is_that_of_brute_force(kinds: int) -> None:
    everyone = {share: p99_of(constant(share), kinds) for share in case(kinds).grid()}
    best = found("best_static", kinds)
    assert everyone[best.knots[0][1]] == min(everyone.values())


def test_the_best_static_share_is_better_than_its_neighbours_whatever_the_coarse_runs_say() -> None:
    mine = case(2)
    best = find_yardstick("best_static", mine, Effort(search_scale=8, coarse_step=10, tolerance=0))
    share = best.knots[0][1]
    place = mine.grid().index(share)
    beside = mine.grid()[max(0, place - 1) : place + 2]
    assert p99_of(best, 2) == min(p99_of(constant(one), 2) for one in beside)


def test_a_static_share_is_reached_in_the_warm_up_from_where_everybody_starts() -> None:
    result = case(2).run(constant(0.3), 1)
    steps = result.steps
    share = steps["emb_pages"] / result.num_pages
    assert share[0] == pytest.approx(0.5, abs=0.01)
    counted = steps["began_s"] >= result.trace.workload.warm_up_s
    np.testing.assert_allclose(share[counted], 0.3, atol=0.01)


# ---------------------------------------------------------------- schedules


def test_the_best_schedule_is_never_worse_than_the_best_static_share() -> None:
    assert p99_of(found("best_schedule", 2), 2) <= p99_of(found("best_static", 2), 2)
    assert found("best_schedule", 1) == found("best_static", 1)


def test_without_a_budget_the_best_schedule_is_the_best_static_share() -> None:
    spent = Effort(search_scale=1, coarse_step=5, evaluations=0)
    assert find_yardstick("best_schedule", case(2), spent) == found("best_static", 2)


def test_a_schedule_keeps_the_slew_limit() -> None:
    schedule = Schedule(((0.0, 0.2), (5.0, 0.2), (5.1, 0.8), (20.0, 0.4)))
    targets = schedule.targets(0.5, slew_per_s=0.3, seconds=25.0)
    moves = [(0.0, 0.5), *targets]
    for (before, share), (when, other) in pairwise(moves):
        assert abs(other - share) <= 0.3 * (when - before) + 1e-9
    assert targets[-1][1] == pytest.approx(0.4)
    reached = [share for when, share in targets if 4.5 < when <= 5.0]
    assert reached == pytest.approx([0.2] * len(reached))


def test_a_family_has_a_share_for_each_kind_and_moves_with_the_regimes() -> None:
    family = ScheduleFamily(two_kinds())
    assert family.num_kinds == 2
    assert family.ramps == [4.0, 0.0]
    schedule = family.schedule(np.array([0.2, 0.7, -2.0, 4.0, 3.0, 0.0]))
    # The warm-up takes 5 s and each regime 15 s.
    moments = np.array([0.0, 18.0, 20.0, 22.0, 37.9, 38.2])
    wanted = [0.2, 0.2, 0.45, 0.7, 0.7, 0.2]
    np.testing.assert_allclose(schedule.wanted(moments), wanted, atol=1e-9)
    flat = family.vector([0.4, 0.4], follows_ramps=True)
    np.testing.assert_allclose(family.schedule(flat).wanted(np.arange(60.0)), 0.4)
    assert family.clipped(np.array([0.0, 1.0, -9.0, -1.0, 3.0, 2.0]), 0.1, 0.9).tolist() == [
        0.1, 0.9, -9.0, 0.0, 3.0, 2.0,
    ]  # fmt: skip


# ---------------------------------------------------------------- the oracle


def test_a_static_run_at_its_own_best_is_nowhere_away_from_the_oracle() -> None:
    """One window's cheapest share costs the least there, and its gap there is 0."""
    table = costs(1)
    total = table.cost_ms.mean(axis=1)
    best = table.shares[int(total.argmin())]
    always = WindowCosts(table.begins, table.shares, np.tile(total, (len(table.begins), 1)).T)
    assert always.fraction_gap(case(1).run(constant(best + 1e-6), 1)) == pytest.approx(0, abs=1e-9)
    wrong = 0.1 if best > 0.4 else 0.9
    assert always.fraction_gap(case(1).run(constant(wrong), 1)) > 0.2


def test_the_regret_of_a_static_run_is_its_own_cost_less_the_least() -> None:
    table = costs(2)
    share = case(2).grid(EFFORT.coarse_step)[1]
    mine = table.cost_ms[1] - table.cost_ms.min(axis=0)
    regret = table.regret_ms(case(2).run(constant(share), 1))
    assert regret == pytest.approx(mine.mean())
    assert regret > 0.0


def test_the_costs_of_windows_add_up_to_what_the_device_did() -> None:
    result = case(2).run(constant(0.4), 1)
    steps = result.steps
    spent = sum(float(steps[name].sum()) for name in ("load_ms", "prefill_ms", "score_ms"))
    moved = steps["requests"] == 0
    background = sum(float(steps[name][moved].sum()) for name in ("load_ms", "prefill_ms"))
    assert result.service_ms.sum() == pytest.approx(spent - background)
    trace = result.trace
    begins = np.arange(0.0, trace.seconds, WINDOW_S)
    number, _ = np.histogram(trace.arrivals, [*begins, begins[-1] + WINDOW_S])
    mine = cost_by_window(trace.arrivals, result.service_ms, begins)
    assert (mine * number).sum() == pytest.approx(result.service_ms.sum())


def test_failed_requests_cost_no_window_anything() -> None:
    arrivals, service = np.array([0.5, 1.0, 6.0]), np.array([4.0, np.nan, np.nan])
    found = cost_by_window(arrivals, service, np.array([0.0, 5.0, 10.0]))
    np.testing.assert_array_equal(found, [4.0, np.nan, np.nan])


def test_the_oracle_follows_the_kinds_of_regimes() -> None:
    schedule = found("oracle", 2)
    regulars, passing = schedule.wanted(np.array([17.0, 32.0]))
    assert passing > regulars + 0.1


# ---------------------------------------------------------------- all of them


def test_yardsticks_are_known_by_name() -> None:
    assert list(YARDSTICKS) == ["best_static", "best_schedule", "oracle"]
    with pytest.raises(ValueError, match=r"yardstick: 'best' is unknown \(known: best_static"):
        find_yardstick("best", case(1), EFFORT)


def test_who_failed_is_slower_than_any() -> None:
    latencies = np.arange(1.0, 201.0)
    assert p99_ms(latencies) == pytest.approx(np.quantile(latencies, 0.99))
    latencies[0] = np.nan
    assert p99_ms(latencies) == pytest.approx(np.quantile([*np.arange(2.0, 201.0), 201.0], 0.99))
    latencies[:10] = np.nan
    assert p99_ms(latencies) == np.inf
    assert p99_ms(np.empty(0)) == np.inf

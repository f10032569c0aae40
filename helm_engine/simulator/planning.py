"""What a recorded trace says: the best split, what adapting would gain, how many engines it takes.

Everything is measured on the recorded requests themselves, so it is what would have been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.figures import Figures, figures, fraction_over_time
from helm_engine.simulator.hindsight import Case, Effort, p99_of, served_ms
from helm_engine.simulator.oracle import WindowCosts, window_costs
from helm_engine.simulator.phases import phases_of, requests_of
from helm_engine.simulator.recording import Recording
from helm_engine.simulator.scaling import SCALES
from helm_engine.simulator.schedule import constant
from helm_engine.simulator.simulation import Result
from helm_engine.simulator.spreading import Spread, SpreadFigures
from helm_engine.simulator.workloads import Setting
from helm_engine.simulator.yardsticks import best_schedule, best_static
from model_executor.cost_profile import CostProfile

ENOUGH_SHARE = 0.99
"""Engines are enough that keep the SLO for such a share of the requests."""
_WARM_UP_SHARE = 0.1
_LEAST_PAGES = 512
"""A pool of fewer pages is not searched at a scale."""


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """What is asked."""

    engines: tuple[int, ...] = (1, 2, 4)
    controllers: tuple[str, ...] = ()
    """By name; see `make_controller`."""
    warm_up_s: float | None = None
    """Requests of so many first seconds are not counted; None = of a tenth of the time."""
    pool_bytes: int | None = None
    """None = the server's."""
    slo_ms: float | None = None
    """None = the server's."""
    scale: int = 1
    """At which what is told is measured; see `scaling`."""
    search_scale: int | None = None
    """At which it is looked for; None = as large as histories and pool allow, up to 16."""
    evaluations: int = 12
    """Schedules that are tried."""


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One who decides on the split, and what that comes to."""

    name: str
    figures: Figures
    p99_ms: float
    """Infinite if one request in 100 failed."""
    device_ms: float
    """Of the device, for each request."""
    split: list[tuple[float, float]]
    """Seconds after the start, and EMB's share of the pages from then on."""


@dataclass(slots=True)
class Plan:
    """The answers."""

    setting: Setting
    search_scale: int
    warm_up_s: float
    best_share: float
    lines: list[PlanLine] = field(default_factory=list)
    static: dict[float, tuple[float, float]] = field(default_factory=dict)
    """P99 and milliseconds of the device of static shares, at the scale of the search."""
    num_phases: int = 1
    static_ms: float = 0.0
    """Of the device for each request, of the cheapest static share; at the scale of the search."""
    oracle_ms: float = 0.0
    """Likewise, if each window of five seconds had its cheapest share: no boundary could follow."""
    engines: list[SpreadFigures] = field(default_factory=list)


def make_plan(
    recording: Recording,
    profile: CostProfile,
    config: PlanConfig,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Looks for the answers: some fifty runs of the trace, about 2.5 s each for 10,000 requests.

    Args:
        recording: of a server.
        profile: what work costs on the device.
        config: what is asked.
        say: is told what is being done.

    Raises:
        PoolTooSmallError: the pool cannot hold what one request may need.
        ValueError: a controller is unknown, there is no engine, or no request behind the warm-up.
    """
    case, effort = _case(recording, profile, config)
    say("looking for the best static split")
    static = best_static(case, effort)
    share = static.knots[0][1]
    costs = window_costs(case, effort)
    plan = Plan(case.model(1).setting, effort.search_scale, case.workload.warm_up_s, share)
    _count_costs(plan, case, effort, costs)
    if recording.header.controller is None:
        as_served = constant(case.start)
        plan.lines.append(_line("as served", case.run(as_served, effort.scale)))
    plan.lines.append(_line("best static", case.run(static, effort.scale)))
    if len(costs.begins):
        say("looking for the best schedule")
        told = _in_phases(case, recording, costs)
        plan.num_phases = len(told.workload.regimes)
        schedule = best_schedule(told, effort)
        plan.lines.append(_line("best schedule", told.run(schedule, effort.scale)))
    for name in config.controllers:
        say(f"running {name}")
        plan.lines.append(_line(name, case.run_controller(name, effort.scale)))
    for number in config.engines:
        say(f"trying {number} engines")
        spread = Spread(case, number)
        best = share if number == 1 else spread.best_static(effort.search_scale, 8)
        plan.engines.append(spread.figures(best, effort.scale))
    return plan


def _case(recording: Recording, profile: CostProfile, config: PlanConfig) -> tuple[Case, Effort]:
    """The recorded requests, and how hard is looked."""
    engine = recording.engine(profile, pool_bytes=config.pool_bytes, slo_ms=config.slo_ms)
    warm_up_s = config.warm_up_s
    if warm_up_s is None:
        warm_up_s = _WARM_UP_SHARE * recording.seconds
    if warm_up_s > recording.arrivals[-1]:
        raise ValueError(
            f"warm_up: {warm_up_s:g} s leave none of the {recording.arrivals[-1]:g} s that were "
            "recorded"
        )
    case = Case(
        recording.workload(engine.setting, warm_up_s),
        profile,
        seed=0,
        start=recording.header.emb_fraction,
        config=ControllerConfig(slo_ms=engine.setting.slo_ms),
        recording=recording,
    )
    effort = Effort(
        scale=config.scale,
        search_scale=max(config.scale, config.search_scale or _search_scale(case, recording)),
        coarse_step=4,
        evaluations=config.evaluations,
        measured=2,
    )
    return case, effort


def _search_scale(case: Case, recording: Recording) -> int:
    """The largest up to 16 with enough pages, and blocks well below the usual history's length."""
    pages = case.model(1).layout(case.start).num_pages
    comes_back = recording.num_blocks[recording.num_blocks > 0]
    blocks = float(np.median(comes_back)) if len(comes_back) else 1.0
    fitting = [
        one for one in SCALES if one <= 16 and one <= blocks / 2 and one <= pages / _LEAST_PAGES
    ]
    return max(fitting, default=1)


def _count_costs(plan: Plan, case: Case, effort: Effort, costs: WindowCosts) -> None:
    """What static splits cost, all the time and in each window."""
    counted = case.trace(effort.search_scale).arrivals >= case.workload.warm_up_s
    for share in case.grid(effort.coarse_step):
        result = case.run(constant(share), effort.search_scale)
        plan.static[share] = p99_of(result), float(np.nanmean(served_ms(result)[counted]))
    requests = requests_of(costs, case.trace(effort.search_scale).arrivals)
    if requests.sum():
        weights = requests / requests.sum()
        plan.static_ms = float((costs.cost_ms @ weights).min())
        plan.oracle_ms = float(costs.cost_ms.min(axis=0) @ weights)


def _in_phases(case: Case, recording: Recording, costs: WindowCosts) -> Case:
    """The case told as phases that are cheapest at other splits."""
    warm_up_s = case.workload.warm_up_s
    phases = phases_of(costs, recording.arrivals, warm_up_s, recording.seconds)
    return case.retold(recording.workload(case.workload.resolved_setting, warm_up_s, phases))


def _line(name: str, result: Result) -> PlanLine:
    trace = result.trace
    counted = trace.arrivals >= trace.workload.warm_up_s
    over_time = fraction_over_time(result)
    return PlanLine(
        name=name,
        figures=figures(result),
        p99_ms=p99_of(result),
        device_ms=float(np.nanmean(served_ms(result)[counted])),
        split=list(zip(over_time["seconds"], over_time["committed"], strict=True)),
    )

"""The parts of the controller benchmark: each measures one workload, setting and seed."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.controller_cases import (
    EFFORTS,
    HELD_OUT,
    HELD_OUT_EFFORT,
    QUICK,
    Named,
    case_of,
    named,
)
from benchmarks.controller_variants import (
    QUICK_SLEWS,
    RANDOM_NETS,
    SLEWS,
    ablations,
    random_nets,
    slews,
)
from helm_engine.controller.base_policy import SHIPPED
from helm_engine.controller.registry import controller_names
from helm_engine.simulator.figures import figures
from helm_engine.simulator.hindsight import Case, Effort
from helm_engine.simulator.oracle import WindowCosts, committed_at, window_costs
from helm_engine.simulator.schedule import Schedule, constant
from helm_engine.simulator.simulation import Result
from helm_engine.simulator.yardsticks import best_schedule, best_static

HEADLINE = ("helm", "marginal", "hill_climb")
"""Beside `best_static` and `best_schedule`."""
TRACED_S = 2.0
"""The split over time is told so often."""


@dataclass(frozen=True)
class Task:
    """What one process works on at a time."""

    setting: str
    """`held_out` for those workloads."""
    workload: str
    seed: int
    parts: tuple[str, ...]
    quick: bool
    traces: bool
    """Whether the split over time is told."""
    controllers: tuple[str, ...] = ()
    """Only these are run, and no yardstick: the file has the others already. Empty: all are."""

    def __str__(self) -> str:
        return f"{self.setting}, {self.workload}, seed {self.seed}"

    @property
    def effort(self) -> Effort:
        """How hard yardsticks are looked for."""
        if self.quick:
            return QUICK
        return HELD_OUT_EFFORT if self.setting == "held_out" else EFFORTS[self.setting]


@dataclass
class Found:
    """What a task measured: records by section, and how fast."""

    sections: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    requests_per_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Simulated ones for each second of processor time, by scale."""


class Measured:
    """Runs of one case, written down alike."""

    def __init__(self, task: Task, one: Named, case: Case, costs: WindowCosts) -> None:
        self.task, self.case, self.costs = task, case, costs
        self.found = Found()
        self._profile = one.profile

    def add(self, section: str, controller: str, scale: int, result: Result, **more: Any) -> None:
        """Writes a run down."""
        told = figures(result)
        self.found.sections[section].append(
            {
                "workload": self.task.workload,
                "setting": self.task.setting,
                "profile": self._profile,
                "k": scale,
                "controller": controller,
                "seed": self.task.seed,
                "p50_ms": told.p50_ms,
                "p99_ms": told.p99_ms,
                "slo": told.slo_share,
                "throughput": told.throughput_per_s,
                "fraction_gap": self.costs.fraction_gap(result),
                "regret_ms": self.costs.regret_ms(result),
                "moves": result.num_moved_pages / result.num_pages,
                **more,
            }
        )

    def controller(self, section: str, name: str, scale: int) -> Result:
        """Runs one by name, with a stop watch."""
        self.case.trace(scale)
        began = time.process_time()
        result = self.case.run_controller(name, scale)
        spent = time.process_time() - began
        self.found.requests_per_s[scale].append(len(result.trace) / spent)
        self.add(section, name, scale, result)
        return result


def run_task(task: Task) -> Found:
    """Measures what a task asks for."""
    held_out = task.setting == "held_out"
    one = HELD_OUT[task.workload]() if held_out else named(task.workload, task.setting)
    case, effort = case_of(one, task.seed), task.effort
    measured = Measured(task, one, case, window_costs(case, effort))
    if held_out:
        _held_out(measured)
    else:
        if "headline" in task.parts:
            _headline(measured)
        if "baselines" in task.parts:
            _baselines(measured)
        if "ablations" in task.parts:
            _ablations(measured)
    found = measured.found
    return found


def _chosen(task: Task, *names: str) -> list[str]:
    """Those of the names (all registered ones if none is given) that the task asks for."""
    return [name for name in registered(*names) if name in (task.controllers or (name,))]


def registered(*names: str) -> list[str]:
    """Those of the names that the registry knows; all of them if none is given.

    Without its policy `helm` would hold the split and be measured as a static one, so it is left
    out.
    """
    known = [name for name in controller_names()[1:] if name != "helm" or SHIPPED.is_file()]
    return [name for name in names if name in known] if names else known


def _headline(measured: Measured) -> None:
    """Controllers and yardsticks at the scale of the result."""
    task = measured.task
    scale = task.effort.scale
    results = {} if task.controllers else _yardsticks(measured)
    for name in _chosen(task, *HEADLINE):
        results[name] = measured.controller("cells", name, scale)
    if task.traces:
        measured.found.sections["traces"].append(_traces(measured, results))


def _yardsticks(measured: Measured) -> dict[str, Result]:
    """What would have been best, at the scale of the result."""
    case, task, effort = measured.case, measured.task, measured.task.effort
    schedules = {
        "best_static": best_static(case, effort),
        "best_schedule": best_schedule(case, effort),
    }
    results = {name: case.run(schedule, effort.scale) for name, schedule in schedules.items()}
    for name, result in results.items():
        measured.add("cells", name, effort.scale, result)
    measured.found.sections["schedules"].append(
        {
            "workload": task.workload,
            "setting": task.setting,
            "seed": task.seed,
            "best_static": schedules["best_static"].knots[0][1],
            "best_schedule": [list(knot) for knot in schedules["best_schedule"].knots],
        }
    )
    return results


def _traces(measured: Measured, results: dict[str, Result]) -> dict[str, Any]:
    """The split over time of each run, and the oracle's."""
    workload = measured.case.workload
    seconds = np.arange(workload.warm_up_s, workload.ends[-1], TRACED_S)
    lines = {name: committed_at(result, seconds) for name, result in results.items()}
    lines["oracle"] = measured.costs.cheapest().wanted(seconds)
    return {
        "workload": measured.task.workload,
        "setting": measured.task.setting,
        "seed": measured.task.seed,
        "seconds": (seconds - workload.warm_up_s).tolist(),
        "regime_ends": [end - workload.warm_up_s for end in workload.ends],
        "emb_fraction": {name: line.round(4).tolist() for name, line in lines.items()},
    }


def _cheap_static(measured: Measured) -> Schedule:
    """The best of the static shares that were run for the oracle."""
    case, effort = measured.case, measured.task.effort
    shares = case.grid(effort.coarse_step)
    return constant(min(shares, key=lambda one: case.static_p99(one, effort.search_scale)))


def _baselines(measured: Measured) -> None:
    """Every controller at the scale of the search, and the best static share of its grid."""
    scale = measured.task.effort.search_scale
    known = {one["controller"] for one in measured.found.sections["cells"] if one["k"] == scale}
    if "best_static" not in known and not measured.task.controllers:
        static = measured.case.run(_cheap_static(measured), scale)
        measured.add("cells", "best_static", scale, static)
    for name in _chosen(measured.task):
        if name not in known:
            measured.controller("cells", name, scale)


def _ablations(measured: Measured) -> None:
    """`helm` without its parts, with random weights, and slower."""
    if not registered("helm"):
        return
    case, scale = measured.case, measured.task.effort.search_scale
    static = case.run(_cheap_static(measured), scale)
    for section in ("ablations", "random_weights", "slew_sweep"):
        more = {"slew_per_s": None} if section == "slew_sweep" else {}
        measured.add(section, "best_static", scale, static, **more)
    for name, result in ablations(case, scale):
        measured.add("ablations", name, scale, result)
    quick = measured.task.quick
    for name, result in random_nets(case, scale, 1 if quick else RANDOM_NETS):
        measured.add("random_weights", name, scale, result)
    for name, slew, result in slews(case, scale, QUICK_SLEWS if quick else SLEWS):
        measured.add("slew_sweep", name, scale, result, slew_per_s=slew)


def _held_out(measured: Measured) -> None:
    """Controllers where training never was."""
    scale = measured.task.effort.search_scale
    measured.add(
        "held_out", "best_static", scale, measured.case.run(_cheap_static(measured), scale)
    )
    for name in registered(*HEADLINE):
        measured.controller("held_out", name, scale)

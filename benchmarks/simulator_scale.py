r"""What `--scale k` changes: figures of the same trace at k = 1 and at others, and what they cost.

Each workload of the package with static splits and with controllers. Told are differences to k = 1
of hit rates (points), of the mean committed share of EMB (over all and, at most, in one regime) and
the ratio of P99. What a controller does depends on small things; how much is told by a second run
at k = 1 that starts with a share of EMB one point larger (`nudged`). Time is virtual, so no figure
but the speed depends on the machine; speeds are of processor time, taken in one run.

    python benchmarks/simulator_scale.py --seeds 1,2,3 \
        --json benchmarks/results/simulator_scale.json
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np

from benchmarks.report import benchmark_parser, write_result
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.figures import Figures, figures, figures_by_regime
from helm_engine.simulator.simulation import EngineModel, simulate
from helm_engine.simulator.trace import Trace, make_trace
from helm_engine.simulator.workloads import BUILTIN, load_workload
from model_executor.cost_profile import CostProfile, load_cost_profile

WORKLOADS = ("steady", "trend", "burst")
PROFILE = "cpu-slow-redis"
SHARES = (0.2, 0.4, 0.6, 0.8)
CONTROLLERS = ("marginal", "hill_climb")
START = 0.3
NUDGE = 0.01
"""How much larger the share is that the second run of a controller starts with."""
SCALES = (1, 4, 16, 64)
QUICK = {
    "workloads": ("steady",),
    "shares": (0.4,),
    "controllers": ("marginal",),
    "scales": (1, 16),
}

BOUNDS = {"kv_points": 1.0, "emb_points": 1.0, "emb_fraction": 0.02, "p99": 0.1}
"""Of absolute differences; P99's is relative."""


class Run(NamedTuple):
    """One simulation."""

    all: Figures
    regimes: list[Figures]
    us_per_request: float


def run(trace: Trace, profile: CostProfile, start: float, controller: str | None) -> Run:
    """A trace through an engine of its scale."""
    config = ControllerConfig(name=controller)
    model = EngineModel(trace.setting, profile, controller=config, scale=trace.scale)
    began = time.process_time()
    result = simulate(trace, model, start)
    spent = time.process_time() - began
    return Run(figures(result), figures_by_regime(result), 1e6 * spent / len(trace))


def compared(full: Run, other: Run) -> dict[str, Any]:
    """Figures of the other run less those of the full one."""
    one, base = other.all, full.all
    # Not None: some request ended well in each of these workloads.
    differences: dict[str, Any] = {
        "kv_points": 100.0 * (_number(one.kv_hit_rate) - _number(base.kv_hit_rate)),
        "emb_points": 100.0 * (_number(one.emb_hit_rate) - _number(base.emb_hit_rate)),
        "emb_fraction": _number(one.emb_fraction) - _number(base.emb_fraction),
        "p99": _number(one.p99_ms) / _number(base.p99_ms) - 1.0,
    }
    exceeds = [name for name, bound in BOUNDS.items() if abs(differences[name]) > bound]
    in_a_regime = max(
        abs(_number(mine.emb_fraction) - _number(theirs.emb_fraction))
        for mine, theirs in zip(other.regimes, full.regimes, strict=True)
    )
    return {
        **differences,
        "exceeds": exceeds,
        "emb_fraction_in_a_regime": in_a_regime,
        "slo_share": _number(one.slo_share) - _number(base.slo_share),
        "us_per_request": other.us_per_request,
        "speed": full.us_per_request / other.us_per_request,
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def cells_of(
    workload: str, seed: int, cases: list[tuple[float, str | None]], scales: tuple[int, ...]
) -> list[dict[str, Any]]:
    """All splits and controllers of one workload and seed, at all scales."""
    profile = load_cost_profile(BUILTIN / "profiles" / f"{PROFILE}.json")
    traces = {scale: make_trace(load_workload(workload), seed, scale=scale) for scale in scales}
    cells = []
    for share, controller in cases:
        runs = {scale: run(trace, profile, share, controller) for scale, trace in traces.items()}
        full = runs.pop(1)
        found: dict[str, Any] = {str(scale): compared(full, one) for scale, one in runs.items()}
        if controller is not None:
            found["nudged"] = compared(full, run(traces[1], profile, share + NUDGE, controller))
        cells.append(
            {
                "workload": workload,
                "seed": seed,
                "split": share if controller is None else controller,
                "at_1": {
                    "requests": full.all.requests,
                    "kv_hit_rate": full.all.kv_hit_rate,
                    "emb_hit_rate": full.all.emb_hit_rate,
                    "p99_ms": full.all.p99_ms,
                    "emb_fraction": full.all.emb_fraction,
                    "us_per_request": full.us_per_request,
                },
                "less_at_1": found,
            }
        )
    return cells


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """For static splits and for controllers, at each scale: the largest differences."""
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for cell in cells:
        kind = "static" if isinstance(cell["split"], float) else "controllers"
        for scale, found in cell["less_at_1"].items():
            groups[f"{kind}, {scale}"].append((cell, found))
    return {
        name: {
            "cells": len(group),
            **{f"largest {what}": max(abs(one[what]) for _, one in group) for what in BOUNDS},
            **{f"mean {what}": float(np.mean([one[what] for _, one in group])) for what in BOUNDS},
            "speed": float(np.median([one["speed"] for _, one in group])),
            "exceed": [
                [cell["workload"], cell["split"], cell["seed"], one["exceeds"]]
                for cell, one in group
                if one["exceeds"]
            ],
        }
        for name, group in groups.items()
    }


def drawing(seed: int, workloads: tuple[str, ...], scales: tuple[int, ...]) -> dict[str, float]:
    """Microseconds of drawing a request, by scale: the median over workloads."""
    spent = defaultdict(list)
    for workload in workloads:
        for scale in scales:
            began = time.process_time()
            trace = make_trace(load_workload(workload), seed, scale=scale)
            spent[str(scale)].append(1e6 * (time.process_time() - began) / len(trace))
    return {scale: float(np.median(one)) for scale, one in spent.items()}


def main() -> None:
    """Compares all cells."""
    arguments = benchmark_parser(__doc__).parse_args()
    chosen: dict[str, Any] = QUICK if arguments.quick else {}
    workloads = chosen.get("workloads", WORKLOADS)
    scales = chosen.get("scales", SCALES)
    cases: list[tuple[float, str | None]] = [
        *((share, None) for share in chosen.get("shares", SHARES)),
        *((START, name) for name in chosen.get("controllers", CONTROLLERS)),
    ]
    cells_of(workloads[0], 0, cases[:1], scales)  # Kernels are compiled, pages touched once.
    cells = [
        cell
        for workload in workloads
        for seed in arguments.seeds
        for cell in cells_of(workload, seed, cases, scales)
    ]
    told = {
        "bounds": BOUNDS,
        "summary": summary(cells),
        "drawing_us_per_request": drawing(arguments.seeds[0], workloads, scales),
        "cells": cells,
    }
    write_result(arguments.json, told, arguments.seeds)


if __name__ == "__main__":
    main()

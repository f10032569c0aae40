"""What static splits of the pool cost: the contention in the simulator's workloads.

Every workload over every setting, once for each share that EMB has of the pages, in virtual time.
For each regime: milliseconds of the device for each request that ended in it, the P99 of those that
came in it, the share within the SLO, hit rates. A workload is worth a controller if its regimes
prefer different shares and a wrong one is expensive, at both ends.

    python benchmarks/static_splits.py --json benchmarks/results/static_splits.json --seeds 1,2,3
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
from rich.progress import track

from benchmarks.report import benchmark_parser, write_result
from helm_engine.simulator import figures
from helm_engine.simulator.simulation import EngineModel, Result, simulate
from helm_engine.simulator.trace import make_trace
from helm_engine.simulator.workloads import builtin_names, builtin_or_file, load_workload
from model_executor.cost_profile import load_cost_profile

WORKLOADS = ("steady", "trend", "burst")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUICK_SHARES = (0.1, 0.4, 0.8)
FEW, MANY = 0.25, 0.75
"""Shares that suit one regime and not the other: a wrong split is the other one."""


def run(workload: str, setting: str, seed: int, shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """A cell for each share."""
    wanted = load_workload(workload, setting)
    data = wanted.resolved_setting
    profile = load_cost_profile(builtin_or_file("profiles", data.profile, "profile"))
    trace = make_trace(wanted, seed)
    return [
        {
            "workload": workload,
            "setting": setting,
            "seed": seed,
            "emb_fraction": share,
            "regimes": _regimes(simulate(trace, EngineModel(data, profile), share)),
        }
        for share in track(shares, description=f"{workload}, {setting}, seed {seed}")
    ]


def _regimes(result: Result) -> list[dict[str, Any]]:
    """Figures of each regime, and of all."""
    workload = result.trace.workload
    begins = [workload.warm_up_s, *workload.ends]
    spans = [*zip(begins, workload.ends, strict=False), (begins[0], begins[-1])]
    told = [*figures.figures_by_regime(result), figures.figures(result)]
    ended = result.trace.arrivals + result.latencies_ms / 1e3
    steps, found = result.steps, []
    for one, (begin, end) in zip(told, spans, strict=True):
        mine = (steps["began_s"] >= begin) & (steps["began_s"] < end)
        busy_s = float((steps["ended_s"] - steps["began_s"])[mine].sum())
        number = int(((ended >= begin) & (ended < end)).sum())
        found.append(
            {
                **asdict(one),
                "device_ms_per_request": 1e3 * busy_s / number if number else None,
                "device_busy": busy_s / (end - begin),
            }
        )
    return found


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each workload over each setting and regime, medians of the seeds."""
    found = []
    for key in dict.fromkeys((one["setting"], one["workload"]) for one in cells):
        mine = [one for one in cells if (one["setting"], one["workload"]) == key]
        shares = sorted({one["emb_fraction"] for one in mine})
        for place, regime in enumerate(mine[0]["regimes"]):
            found.append(
                {
                    "setting": key[0],
                    "workload": key[1],
                    "regime": regime["name"],
                    **_best(mine, shares, place),
                }
            )
    return found


def _best(cells: list[dict[str, Any]], shares: list[float], place: int) -> dict[str, Any]:
    def medians(field: str) -> list[float]:
        return [
            float(
                np.median(
                    [one["regimes"][place][field] for one in cells if one["emb_fraction"] == share]
                )
            )
            for share in shares
        ]

    device, p99, within = (
        medians(field) for field in ("device_ms_per_request", "p99_ms", "slo_share")
    )
    few, many = np.interp([FEW, MANY], shares, device)
    return {
        "shares": shares,
        "device_ms_per_request": device,
        "p99_ms": p99,
        "slo_share": within,
        "cheapest_share": shares[int(np.argmin(device))],
        "best_p99_share": shares[int(np.argmin(p99))],
        "best_slo_share": max(within),
        "wrong_split_costs": float(max(few, many) / min(few, many)),
        "p99_of_the_ends": max(p99[0], p99[-1]) / min(p99[0], p99[-1]),
    }


def main() -> None:
    """Runs all settings; the data of `ml100k` have to be there."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--settings", default=",".join(builtin_names("settings")))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    arguments = parser.parse_args()
    shares = QUICK_SHARES if arguments.quick else SHARES
    cells: list[dict[str, Any]] = []
    for setting in arguments.settings.split(","):
        for workload in arguments.workloads.split(","):
            for seed in arguments.seeds:
                cells += run(workload, setting, seed, shares)
    write_result(arguments.json, {"summary": summary(cells), "cells": cells}, arguments.seeds)


if __name__ == "__main__":
    main()

"""How many requests a second the simulator gets through, and where its time goes.

Users with histories of 4,096 tokens come back; a request reads about 1,000 distinct rows. The load
decides how many requests share a step: at a tenth of what the device can do most run alone, near
its limit several run together. Seconds are of the processor, drawing the trace is told apart.

    python benchmarks/simulator.py --json benchmarks/results/simulator.json --seeds 1,2,3
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import msgspec
import numpy as np

from benchmarks.report import benchmark_parser, write_result
from helm_engine.simulator.figures import figures
from helm_engine.simulator.simulation import EngineModel, simulate
from helm_engine.simulator.trace import make_trace
from helm_engine.simulator.workloads import BUILTIN, Regime, Workload, load_setting
from model_executor.cost_profile import load_cost_profile

TOKENS = 4096
ITEMS = 4_000_000
POOL_BYTES = 1 << 30
REQUESTS = 6000
QUICK_REQUESTS = 1500
LOADS_PER_S = (2.0, 20.0)
EMB_FRACTION = 0.3
TOLD = 15


def workload(requests_per_s: float, requests: int) -> Workload:
    """Mostly regulars; their histories stay within a sixteenth of 4,096 tokens."""
    regime = Regime(
        name="speed",
        seconds=requests / requests_per_s,
        hot_user_share=0.95,
        hot_users=40,
        history_mean=TOKENS - TOKENS // 16,
        new_events=2,
        candidates=1300,
        item_zipf=1.0,
    )
    setting = msgspec.structs.replace(
        load_setting("dlrmv3"),
        requests_per_s=requests_per_s,
        max_history=TOKENS,
        num_items=ITEMS,
        pool_bytes=POOL_BYTES,
    )
    return Workload(name="speed", description="", setting=setting, warm_up_s=0.0, regimes=[regime])


def cell(requests_per_s: float, requests: int, seed: int) -> dict[str, Any]:
    """One load: requests per second of processor time, and what a request was."""
    began = time.process_time()
    trace = make_trace(workload(requests_per_s, requests), seed)
    drawn = time.process_time()
    model = EngineModel(trace.setting, _profile())
    simulate(trace, model, EMB_FRACTION)  # Pages of the process are touched once.
    simulated = time.process_time()
    result = simulate(trace, model, EMB_FRACTION)
    spent = time.process_time() - simulated
    found = figures(result)
    return {
        "requests_per_s_of_virtual_time": requests_per_s,
        "seed": seed,
        "requests": len(trace),
        "simulated_requests_per_s": len(trace) / spent,
        "trace_requests_per_s": len(trace) / (drawn - began),
        "tokens": float(trace.lengths.mean()),
        "rows": float(result.rows_requested.mean()),
        "steps_per_request": float(len(result.steps["rows"]) / len(trace)),
        "p99_ms": found.p99_ms,
        "kv_hit_rate": found.kv_hit_rate,
        "emb_hit_rate": found.emb_hit_rate,
    }


def hot_spots(requests_per_s: float, requests: int, seed: int) -> list[dict[str, Any]]:
    """Functions that take most of the time by themselves, by a profiler, which slows calls."""
    trace = make_trace(workload(requests_per_s, requests), seed)
    profiler = cProfile.Profile()
    profiler.runcall(simulate, trace, EngineModel(trace.setting, _profile()), EMB_FRACTION)
    timed: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(line[2] for line in timed.values())
    ordered = sorted(timed.items(), key=lambda line: -line[1][2])[:TOLD]
    return [
        {"function": f"{Path(place[0]).name}:{place[2]}", "share": line[2] / total}
        for place, line in ordered
    ]


def _profile() -> Any:
    return load_cost_profile(BUILTIN / "profiles" / "cpu-slow-redis.json")


def main() -> None:
    """Measures both loads for each seed."""
    arguments = benchmark_parser(__doc__).parse_args()
    requests = QUICK_REQUESTS if arguments.quick else REQUESTS
    make_trace(workload(10.0, 10), 0)  # Kernels are compiled.
    cells = [cell(load, requests, seed) for seed in arguments.seeds for load in LOADS_PER_S]
    rates = {
        load: [
            one["simulated_requests_per_s"]
            for one in cells
            if one["requests_per_s_of_virtual_time"] == load
        ]
        for load in LOADS_PER_S
    }
    told = {
        "simulated_requests_per_s": min(float(np.median(one)) for one in rates.values()),
        "cells": cells,
        "hot_spots": hot_spots(LOADS_PER_S[-1], requests, arguments.seeds[0]),
    }
    write_result(arguments.json, told, arguments.seeds)


if __name__ == "__main__":
    main()

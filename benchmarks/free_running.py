"""Whether the simulator says what happens: the same requests through the engine and through it.

The engine runs on this machine in real time, with tensors, its rows in a Redis behind a link of
stated speed; the simulator in virtual time, with a cost profile that is measured here first. Both
get the same requests open-loop at the same times and nothing else of each other: no step of the one
is told to the other. Each cell, a static split or one that moves, is run several times for real.
Bounds: hit rates within a point, P50 within 10 %, P99 within the larger of 15 % and the spread of
the real repeats. Runs in which the machine was busier than 90 % are void.

    python benchmarks/free_running.py --json benchmarks/results/free_running.json --seeds 1,2
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
from rich.progress import track

from benchmarks import burst_requests
from benchmarks.cpu_use import MOST_BUSY, CpuUse
from benchmarks.parameter_server import ParameterServer, rows_behind_link
from benchmarks.report import benchmark_parser, write_result
from block_manager.pool_layout import PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, HostTierConfig
from helm_engine.engine_core import EngineCore
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.profiling import measure_profile
from helm_engine.scheduler import build_scheduler
from helm_engine.simulator.figures import Figures, figures
from helm_engine.simulator.open_loop import RealTimer, offer
from helm_engine.simulator.simulation import (
    EngineModel,
    Ledger,
    Result,
    Split,
    run_trace,
    simulate,
)
from helm_engine.simulator.step_log import StepLog
from helm_engine.simulator.trace import RULES, Trace, make_trace

REPEATS = 3
"""Of each cell in real time."""
REGIME_S, WARM_UP_S = 15.0, 10.0
QUICK_REGIME_S, QUICK_WARM_UP_S = 4.0, 2.0
QUICK_BATCHES = 60
HIT_POINTS, P50_SHARE, P99_SHARE = 1.0, 0.10, 0.15
PHASES = ("load_ms", "prefill_ms", "score_ms")


@dataclass(frozen=True, slots=True)
class Cell:
    """A split of the pool, or one that moves."""

    name: str
    emb_fraction: float
    schedule: tuple[Split, ...] = ()


@dataclass(frozen=True, slots=True)
class RealRun:
    """One repeat on this machine."""

    result: Result
    cpu_shares: dict[str, float]

    @property
    def is_void(self) -> bool:
        """Whether the machine was too busy for it to count."""
        return self.cpu_shares["machine"] > MOST_BUSY


def cells(warm_up_s: float, regime_s: float, is_quick: bool) -> list[Cell]:
    """Little for EMB, much, and a boundary that changes with the regimes."""
    turns = [(warm_up_s + place * regime_s, (0.7, 0.3)[place % 2]) for place in range(1, 4)]
    moving = Cell("moving", 0.7, tuple(turns))
    return [moving] if is_quick else [Cell("static 0.3", 0.3), Cell("static 0.6", 0.6), moving]


def load(rows: ParameterServer) -> LoadedEngine:
    """The engine over rows behind the link."""
    config = EngineConfig(
        burst_requests.served_model(),
        pool=PoolConfig(burst_requests.POOL_BYTES),
        scheduler=burst_requests.SCHEDULER,
        host_tier=HostTierConfig(link_bytes_per_second=int(burst_requests.LINK_BYTES_PER_S)),
    )
    return load_engine(config, SystemClock(), rows.store(timeout_s=10.0))


def real_run(
    engine: LoadedEngine, model: EngineModel, trace: Trace, cell: Cell, rows: ParameterServer
) -> RealRun:
    """A trace through the engine that computes, with empty books as in the simulator."""
    clock, served = SystemClock(), engine.served
    emb_pages = served.layout.emb_pages_of(cell.emb_fraction)
    layout = replace(served.layout, num_emb_pages=emb_pages)
    assert layout == model.layout(cell.emb_fraction)
    scheduler = build_scheduler(
        model.scheduler_config(),
        layout,
        served.model_config.num_rows,
        RULES,
        refill=model.refill_budget(),
    )
    log = StepLog(engine.runner, scheduler, clock)
    core = EngineCore(scheduler, log, clock)
    gc.collect()
    gc.freeze()  # As the engine core does after its start.
    use = CpuUse({"engine": [os.getpid()], "redis": [rows.redis_pid], "link": [rows.link_pid]})
    result = run_trace(trace, core, RealTimer(), log, cell.schedule)
    shares = use.shares()
    gc.unfreeze()
    offer(core, RealTimer(), [], Ledger(0), drain=True)  # A refill may be under way.
    return RealRun(result, shares)


def compare(real: Sequence[Result], simulated: Result) -> dict[str, Any]:
    """What the simulator says against what happened, and whether it is within the bounds.

    Args:
        real: repeats of the same trace; the median of each figure counts.
        simulated: the same trace in virtual time.
    """
    told, happened = figures(simulated), [figures(one) for one in real]
    hits = {
        name: 100.0 * (_of(told, name) - _median(happened, name))
        for name in ("kv_hit_rate", "emb_hit_rate")
    }
    p99 = [_of(one, "p99_ms") for one in happened]
    spread = (max(p99) - min(p99)) / float(np.median(p99))
    p50_ratio = _of(told, "p50_ms") / _median(happened, "p50_ms")
    p99_ratio = _of(told, "p99_ms") / _median(happened, "p99_ms")
    return {
        "hit_points": hits,
        "p50_ratio": p50_ratio,
        "p99_ratio": p99_ratio,
        "p99_spread": spread,
        "within_bounds": {
            "hits": max(map(abs, hits.values())) <= HIT_POINTS,
            "p50": abs(p50_ratio - 1.0) <= P50_SHARE,
            "p99": abs(p99_ratio - 1.0) <= max(P99_SHARE, spread),
        },
        "service": service(real, simulated),
    }


def service(real: Sequence[Result], simulated: Result) -> dict[str, float]:
    """Time in steps, simulated over real, apart for loads; and the real engine's share of time."""
    means = {name: float(np.mean([one.steps[name].sum() for one in real])) for name in PHASES}
    told = {name: float(simulated.steps[name].sum()) for name in PHASES}
    computed = means["prefill_ms"] + means["score_ms"]
    return {
        "load": told["load_ms"] / max(means["load_ms"], 1e-9),
        "compute": (told["prefill_ms"] + told["score_ms"]) / max(computed, 1e-9),
        "real_busy_share": (means["load_ms"] + computed) / 1e3 / simulated.trace.seconds,
    }


def _of(one: Figures, name: str) -> float:
    value = getattr(one, name)
    assert value is not None, f"{name}: no request ended well"
    return float(value)


def _median(found: Sequence[Figures], name: str) -> float:
    return float(np.median([_of(one, name) for one in found]))


def line(cell: Cell, seed: int, runs: Sequence[RealRun], simulated: Result) -> dict[str, Any]:
    """A cell of one seed, for the result file."""
    valid = [one.result for one in runs if not one.is_void]
    return {
        "cell": cell.name,
        "seed": seed,
        "requests": len(simulated.trace),
        "real": [
            {**_told(one.result), "cpu_shares": one.cpu_shares, "void": one.is_void} for one in runs
        ],
        "simulated": _told(simulated),
        # Void runs are compared where there are no others, and the cell says so.
        "void": len(valid) < len(runs),
        **compare(valid or [one.result for one in runs], simulated),
    }


def is_shown_within(line: Mapping[str, Any]) -> bool:
    """Whether a cell is within all bounds, by at least one run that counts."""
    return all(line["within_bounds"].values()) and not all(run["void"] for run in line["real"])


def _told(result: Result) -> dict[str, Any]:
    all_of_it = asdict(figures(result))
    return {name: all_of_it[name] for name in FIGURES}


FIGURES = ("requests", "failed", "p50_ms", "p99_ms", "kv_hit_rate", "emb_hit_rate", "emb_fraction")


def main() -> None:
    """Measures the profile, then every cell in turns, and writes the result file."""
    arguments = benchmark_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    regime_s = QUICK_REGIME_S if quick else REGIME_S
    warm_up_s = QUICK_WARM_UP_S if quick else WARM_UP_S
    wanted = cells(warm_up_s, regime_s, quick)
    law = burst_requests.workload(regime_s, warm_up_s)
    link = burst_requests.ROUND_TRIP_MS, burst_requests.LINK_BYTES_PER_S
    with rows_behind_link(burst_requests.served_model(), *link) as rows:
        engine = load(rows)
        batches = {"batches": QUICK_BATCHES} if quick else {}
        measured = measure_profile(engine, device="this machine", source="this run", **batches)
        model = EngineModel(
            law.resolved_setting,
            measured.profile,
            burst_requests.SCHEDULER,
            engine.served.config.host_tier.refill,
        )
        lines = []
        for seed in arguments.seeds:
            trace = make_trace(law, seed)
            runs: dict[str, list[RealRun]] = {cell.name: [] for cell in wanted}
            for _ in track(range(REPEATS), f"seed {seed}"):
                for cell in wanted:
                    runs[cell.name].append(real_run(engine, model, trace, cell, rows))
            for cell in wanted:
                told = simulate(trace, model, cell.emb_fraction, cell.schedule)
                lines.append(line(cell, seed, runs[cell.name], told))
    for one in lines:
        print({name: one[name] for name in one if name not in ("real", "simulated")})
    summary = {
        "within_bounds": all(map(is_shown_within, lines)),
        "void_runs": sum(run["void"] for one in lines for run in one["real"]),
        "cells": lines,
        "profile": asdict(measured),
        "workload": burst_requests.describe(law),
    }
    write_result(arguments.json, summary, arguments.seeds)


if __name__ == "__main__":
    main()

"""What the controller costs a running engine: each decision, and the watching of requests.

A decision (one call of `EngineControl.act`) either asks the policy (`decision_us`: the observation,
the rate, what is written down) or integrates its last rate (`integrate_us`); `all_us` is both.
`ended_request_us` is the watching of each ended request. Wall time is taken around each call, as
the engine makes it: between two queries lies a quarter of a second of other work, so a query finds
little of its own in the processor's caches. In a loop of nothing else it takes a fifth of the time.

`simulated`: returning users are served by the real scheduler in virtual time. `torch`: the real
engine on this machine's processor, a small HSTU, one request after the other. Both with the
estimate of what a page is worth, which is worked out by the steps and not part of a decision.

    python benchmarks/decision_cost.py --json benchmarks/results/decision_cost.json
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
from rich.progress import track

from benchmarks.page_value import FULL, PROFILES, QUICK, Size
from benchmarks.priced_replay import BLOCK_TOKENS, ROWS_PER_PAGE, Replay
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir, returning_visits
from block_manager.page_value import PageValueEstimator, SamplingConfig
from block_manager.pool_layout import PoolConfig
from block_manager.reuse_distance import PageCosts
from helm_engine.body_codec import decode_request
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig
from helm_engine.controller.allocation_controller import AllocationController
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.engine_control import EngineControl
from helm_engine.controller.registry import controller_names, make_controller
from helm_engine.engine_loader import load_engine
from helm_engine.request import Request

CONFIG = ControllerConfig(period_s=0.25)
"""The shortest period: most queries for a trace."""
SLO_MS = 80.0
HISTORY, ITEMS = 512, 100_000
"""Of the real engine's users and catalogue."""
USERS = 200
WARM_SHARE = 0.2
"""Of the time, before anything is counted."""
RUNNING_S, QUICK_RUNNING_S = 60.0, 15.0

Costs = dict[str, dict[str, float]]


class TimedControl(EngineControl):
    """Takes the time of each call."""

    def start(self) -> None:
        """Forgets what was measured."""
        self.query_ns: list[int] = []
        self.integrate_ns: list[int] = []
        self.ended_ns: list[float] = []

    def act(self, now: float) -> None:
        """See `EngineControl.act`."""
        before = self.controller.num_queries
        begin = perf_counter_ns()
        super().act(now)
        spent = perf_counter_ns() - begin
        is_query = self.controller.num_queries != before
        (self.query_ns if is_query else self.integrate_ns).append(spent)

    def observe_ended(self, requests: Sequence[Request], now: float) -> None:
        """See `EngineControl.observe_ended`."""
        begin = perf_counter_ns()
        super().observe_ended(requests, now)
        if requests:
            self.ended_ns.append((perf_counter_ns() - begin) / len(requests))


def percentiles(nanoseconds: Sequence[float]) -> dict[str, float]:
    """Microseconds."""
    if not nanoseconds:
        return {"calls": 0}
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1e3
    return {"calls": len(nanoseconds), "p50": float(p50), "p99": float(p99)}


def costs_of(control: TimedControl) -> Costs:
    """What was measured since the start."""
    return {
        "decision_us": percentiles(control.query_ns),
        "integrate_us": percentiles(control.integrate_ns),
        "all_us": percentiles(control.query_ns + control.integrate_ns),
        "ended_request_us": percentiles(control.ended_ns),
    }


def measure_simulated(size: Size, controller: AllocationController, seed: int) -> Costs:
    """One trace under one controller that knows nothing yet."""
    kv_pages, emb_pages = size.splits["middle"]
    profile = PROFILES["slow_tier"]
    replay = Replay(kv_pages, emb_pages, size.items, profile)
    costs = PageCosts(profile.prefill_row_ms, profile.attention_pair_ms, profile.row_miss_ms)
    pages = kv_pages + emb_pages
    replay.scheduler.page_values = PageValueEstimator(
        pages, ROWS_PER_PAGE, BLOCK_TOKENS, size.items, costs, SamplingConfig(seed=seed)
    )
    control = TimedControl(replay.scheduler, controller, SLO_MS, 0.0)
    control.start()
    replay.core.control = control
    trace = size.trace(seed)
    replay.play(trace[: size.warm_visits])
    control.start()
    gc.collect()
    gc.freeze()  # As the engine core does after its start.
    replay.play(trace[size.warm_visits :])
    return costs_of(control)


def measure_running(seconds: float, controller: AllocationController, seed: int) -> Costs:
    """The real engine for so long, under one controller that knows nothing yet."""
    (profile,) = (REPOSITORY / "benchmarks" / "profiles").glob("*h100*.json")
    pool = PoolConfig(pool_bytes=1 << 27)
    directory = model_dir("abs", HISTORY, ITEMS)
    clock = SystemClock()
    engine = load_engine(EngineConfig(directory, pool=pool, cost_profile=profile), clock)
    core = engine.core
    control = TimedControl(core.scheduler, controller, SLO_MS, clock.now())
    control.start()
    core.control = control
    start, is_warm = clock.now(), False
    for number, asked in enumerate(returning_visits("abs", HISTORY, 10, USERS, seed, ITEMS)):
        now = clock.now()
        if now - start > seconds:
            break
        if not is_warm and now - start > WARM_SHARE * seconds:
            is_warm = True
            control.start()
            gc.collect()
            gc.freeze()
        prepared = engine.processor.process(decode_request(asked.with_user), str(number), now)
        core.add_request(prepared.request)
        core.run_until_idle()
    return costs_of(control)


def main() -> None:
    """Measures every controller and writes the result file."""
    arguments = benchmark_parser(__doc__).parse_args()
    size = QUICK if arguments.quick else FULL
    seconds = QUICK_RUNNING_S if arguments.quick else RUNNING_S
    names = ["static:0.3", *controller_names()[1:], "marginal+recovery"]
    cells = [
        {
            "executor": "simulated",
            "controller": name,
            "seed": seed,
            **measure_simulated(size, make_controller(name, CONFIG), seed),
        }
        for seed in arguments.seeds
        for name in track(names, "controllers", transient=True)
    ]
    cells += [
        {
            "executor": "torch",
            "controller": name,
            "seed": seed,
            **measure_running(seconds, make_controller(name, CONFIG), seed),
        }
        for seed in arguments.seeds
        for name in ("marginal", "helm")
    ]
    for cell in cells:
        print(cell)
    write_result(arguments.json, {"period_s": CONFIG.period_s, "cells": cells}, arguments.seeds)


if __name__ == "__main__":
    main()

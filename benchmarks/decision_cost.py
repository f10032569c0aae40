"""What the controller costs a running engine: each decision, and the watching of requests.

Returning users are served by the real scheduler in virtual time, with a controller and the estimate
of what a page is worth; wall time is taken around each call. A decision either asks the policy (an
observation, the worth of pages, the rate) or integrates its last rate.

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
from block_manager.page_value import PageValueEstimator, SamplingConfig
from block_manager.reuse_distance import PageCosts
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.engine_control import EngineControl
from helm_engine.controller.registry import controller_names, make_controller
from helm_engine.request import Request

CONFIG = ControllerConfig(period_s=0.25)
"""The shortest period: most queries for a trace."""


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


def measure(size: Size, name: str, seed: int) -> dict[str, dict[str, float]]:
    """One trace under one controller."""
    kv_pages, emb_pages = size.splits["middle"]
    profile = PROFILES["slow_tier"]
    replay = Replay(kv_pages, emb_pages, size.items, profile)
    costs = PageCosts(profile.prefill_row_ms, profile.attention_pair_ms, profile.row_miss_ms)
    pages = kv_pages + emb_pages
    replay.scheduler.page_values = PageValueEstimator(
        pages, ROWS_PER_PAGE, BLOCK_TOKENS, size.items, costs, SamplingConfig(seed=seed)
    )
    control = TimedControl(replay.scheduler, make_controller(name, CONFIG), 80.0, 0.0)
    control.start()
    replay.core.control = control
    trace = size.trace(seed)
    replay.play(trace[: size.warm_visits])
    control.start()
    gc.collect()
    gc.freeze()  # As the engine core does after its start.
    replay.play(trace[size.warm_visits :])
    return {
        "decision_us": percentiles(control.query_ns),
        "integrate_us": percentiles(control.integrate_ns),
        "ended_request_us": percentiles(control.ended_ns),
    }


def main() -> None:
    """Measures every controller and writes the result file."""
    arguments = benchmark_parser(__doc__).parse_args()
    size = QUICK if arguments.quick else FULL
    names = ["static:0.3", *controller_names()[1:], "marginal+recovery"]
    cells = [
        {"controller": name, "seed": seed, **measure(size, name, seed)}
        for seed in arguments.seeds
        for name in track(names, "controllers", transient=True)
    ]
    for cell in cells:
        print(cell)
    write_result(arguments.json, {"period_s": CONFIG.period_s, "cells": cells}, arguments.seeds)


if __name__ == "__main__":
    main()

"""What a move of the boundary costs the requests that run meanwhile.

Returning users on `dlrmv3-mini-abs` (640 events, 256 candidates) come open-loop to engines whose
boundary stays at one of two splits, 0.35 of the pool apart, and to one that moves from the one to
the other while they run: p99 of the moving engine over that of the worse of the two still ones,
counted from the move on. In both directions; the figures at the top are of the worse one.

In virtual time the simulated executor prices steps with the profile below. In real time the model
runs on this machine and its rows are in a Redis behind a link of stated round trip and bandwidth;
all six engines take turns, so that a slow minute of the machine hits each of them. `naive` moves
all pages at once and fills them before it goes on.

    python benchmarks/moving.py --json benchmarks/results/moving.json --seeds 1,2,3,4,5
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from benchmarks.movers import (
    CountingStore,
    DemandCounter,
    NaiveRunner,
    make_scheduler,
    simulated_core,
)
from benchmarks.parameter_server import rows_behind_link
from benchmarks.pool_history import PoolHistory, draw
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir, returning_visits
from benchmarks.timed_requests import Outcome, offer
from block_manager.pool_layout import PoolConfig
from helm_engine.body_codec import decode_request
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, SchedulerConfig
from helm_engine.engine_core import EngineCore
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.engine_messages import AddRequest
from helm_engine.simulator.open_loop import RealTimer, Timer, VirtualTimer
from model_executor.cost_profile import CostProfile

HISTORY = 640
NUM_ITEMS = 200_000
USERS = 64
POOL = PoolConfig(pool_bytes=72 << 20)
SPLITS = (0.15, 0.5)
WARM_UP_VISITS = 500
MOVE_AT_S = 1.0
SECONDS = 11.0
QUICK_SECONDS = 4.0
VIRTUAL_REQUESTS_PER_S = 70.0
UTILISATION = 0.5
"""Of what the slower still engine answers on this machine: the rate in real time."""
IN_FLIGHT = 8
"""Requests at once while that is measured."""
ROUND_TRIP_MS = 1.0
LINK_BYTES_PER_S = 50e6
LOOK_S = 0.02
BOOTSTRAPS = 1000

PROFILE = CostProfile(
    device="two CPU cores, rows in a Redis behind a slow link",
    source="serving.json of this repository (prefill, candidates); the link as stated",
    step_ms=1.0,
    prefill_row_ms=0.0095,
    attention_pair_ms=9.6e-6,
    candidate_ms=0.016,
    retrieval_ms=0.0,
    row_miss_ms=512 / LINK_BYTES_PER_S * 1e3,
    round_trip_ms=ROUND_TRIP_MS,
    row_copy_ms=0.0002,
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One engine of a comparison."""

    name: str
    begins: float
    ends: float
    naive: bool = False

    @property
    def moves(self) -> bool:
        """Whether its boundary is moved."""
        return self.begins != self.ends


def arms() -> list[Arm]:
    """Both still engines, and each way to move in both directions."""
    low, high = SPLITS
    still = [Arm("still_low", low, low), Arm("still_high", high, high)]
    ways = [("up", low, high), ("down", high, low)]
    return still + [
        Arm(f"{mover}_{way}", begins, ends, naive=mover == "naive")
        for way, begins, ends in ways
        for mover in ("moving", "naive")
    ]


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests that every arm of a repeat gets."""

    seconds: float
    warm_up: list[tuple[float, AddRequest]]
    measured: list[tuple[float, AddRequest]]


def make_trace(engine: LoadedEngine, seed: int, seconds: float, rate: float) -> Trace:
    """Visits of returning users, the measured ones at the times of a Poisson process."""
    numbers = np.random.default_rng(seed)
    gaps = numbers.exponential(1.0 / rate, size=int(3 * rate * seconds) + 100)
    times = np.cumsum(gaps)
    times = times[times < seconds]
    visits = returning_visits("abs", HISTORY, 8, USERS, seed, NUM_ITEMS)
    messages = [
        AddRequest.of(
            engine.processor.process(
                decode_request(asked.with_user), f"{seed}-{place}", 0.0
            ).request
        )
        for place, asked in enumerate(islice(visits, WARM_UP_VISITS + len(times)))
    ]
    warm_up = [(0.0, message) for message in messages[:WARM_UP_VISITS]]
    return Trace(
        seconds, warm_up, list(zip(times.tolist(), messages[WARM_UP_VISITS:], strict=True))
    )


class Watch:
    """Looks at an engine's pool now and then while requests run."""

    def __init__(self, core: EngineCore, timer: Timer) -> None:
        self._core = core
        self._timer = timer
        self._begin = timer.now()
        self.moved_after: float | None = None
        """Seconds from the wish to the last page."""
        self.history = PoolHistory()

    def look(self) -> None:
        """Notes the state of the pool."""
        seconds = self._timer.now() - self._begin
        scheduler = self._core.scheduler
        self.history.note(scheduler, seconds)
        has_moved = seconds > MOVE_AT_S and scheduler.boundary.lag_pages == 0
        if has_moved and self.moved_after is None:
            self.moved_after = seconds - MOVE_AT_S


def measure(arm: Arm, core: EngineCore, timer: Timer, trace: Trace) -> tuple[Outcome, Watch]:
    """Warms an arm up, then offers the measured requests and moves its boundary meanwhile."""
    offer(core, timer, trace.warm_up)
    watch = Watch(core, timer)
    looks = [(when, watch.look) for when in np.arange(0.0, trace.seconds, LOOK_S).tolist()]
    moves = [(MOVE_AT_S, lambda: core.set_target(arm.ends))] if arm.moves else []
    outcome = offer(core, timer, trace.measured, [*looks, *moves], keep_scores=True)
    offer(core, timer, [], drain=True)  # A refill may be under way.
    core.scheduler.check_integrity()
    return outcome, watch


def virtual_repeat(engine: LoadedEngine, trace: Trace) -> dict[str, Result]:
    """All arms in virtual time."""
    results = {}
    for arm in arms():
        core, clock, critical = simulated_core(engine, PROFILE, arm.begins, arm.naive)
        outcome, watch = measure(arm, core, VirtualTimer(clock), trace)
        results[arm.name] = Result(outcome, watch, critical())
    return results


def sustainable_rate(engine: LoadedEngine) -> float:
    """Requests per second that both still engines can answer with something to spare."""
    slowest = np.inf
    for arm in arms()[:2]:
        core = EngineCore(make_scheduler(engine, arm.begins, False), engine.runner, SystemClock())
        visits = [message for _, message in make_trace(engine, 0, 1.0, 1.0).warm_up]
        half = len(visits) // 2
        for first in range(0, len(visits), IN_FLIGHT):
            if first <= half < first + IN_FLIGHT:
                begin, number = time.monotonic(), len(visits) - first
            for message in visits[first : first + IN_FLIGHT]:
                core.add_request(message.request())
            core.run_until_idle()
        slowest = min(slowest, number / (time.monotonic() - begin))
    return float(UTILISATION * slowest)


def real_repeat(engine: LoadedEngine, store: CountingStore, trace: Trace) -> dict[str, Result]:
    """All arms on this machine, one after the other."""
    results = {}
    row_bytes = 4 * engine.served.model_config.row_dim
    for arm in arms():
        executor = NaiveRunner(engine.runner) if arm.naive else engine.runner
        demand = DemandCounter(executor, row_bytes)
        scheduler = make_scheduler(engine, arm.begins, arm.naive)
        core = EngineCore(scheduler, demand, SystemClock())
        before = store.step_bytes
        outcome, watch = measure(arm, core, RealTimer(), trace)
        results[arm.name] = Result(outcome, watch, store.step_bytes - before - demand.bytes)
    return results


@dataclass(frozen=True, slots=True)
class Result:
    """What an arm did in one repeat."""

    outcome: Outcome
    watch: Watch
    critical_bytes: int
    """Refilled bytes that steps waited for."""

    @property
    def latencies(self) -> npt.NDArray[np.float64]:
        """Milliseconds of the requests that came from the move on."""
        since = np.array(self.outcome.due) >= MOVE_AT_S
        return np.array(self.outcome.latencies_ms)[since]


def cells(repeats: Sequence[dict[str, Result]], kind: str) -> list[dict[str, Any]]:
    """Each arm's figures over all repeats."""
    found = []
    for arm in arms():
        results = [repeat[arm.name] for repeat in repeats]
        histories = [one.watch.history for one in results]
        moved = [one.watch.moved_after for one in results if one.watch.moved_after is not None]
        found.append(
            {
                "time": kind,
                "arm": arm.name,
                "emb_fraction": [arm.begins, arm.ends],
                "p50_ms": float(np.mean([np.median(one.outcome.latencies_ms) for one in results])),
                "p99_ms": float(
                    np.percentile(np.concatenate([one.latencies for one in results]), 99)
                ),
                "p99_ms_of_each_repeat": [
                    float(np.percentile(one.latencies, 99)) for one in results
                ],
                "slowest_ms": float(np.mean([max(one.outcome.latencies_ms) for one in results])),
                "moved_after_s": max(moved) if arm.moves and len(moved) == len(results) else None,
                "failed_requests": sum(one.outcome.failures for one in results),
                "refill_bytes_on_critical_path": sum(one.critical_bytes for one in results),
                "row_hit_share": float(
                    np.mean([one.watch.history.row_hit_share for one in results])
                ),
                "cached_token_share": float(np.mean([one.cached_token_share for one in histories])),
            }
        )
    return found


def ratio(repeats: Sequence[dict[str, Result]], mover: str) -> dict[str, Any]:
    """p99 of a mover over the worse still engine's, of the direction in which it is larger.

    The percentiles are of the requests of all repeats together: the worse of two engines, chosen
    anew in each repeat, would be worse than either. The interval (95 %) is a bootstrap's over the
    repeats.
    """
    draws = np.random.default_rng(0).integers(len(repeats), size=(BOOTSTRAPS, len(repeats)))
    found = []
    for way in ("up", "down"):
        drawn = [
            _pooled_ratio([repeats[place] for place in draw], f"{mover}_{way}") for draw in draws
        ]
        low, high = np.percentile(drawn, [2.5, 97.5])
        value = _pooled_ratio(repeats, f"{mover}_{way}")
        found.append({"way": way, "ratio": value, "interval": [float(low), float(high)]})
    return max(found, key=lambda one: one["ratio"])


def _pooled_ratio(repeats: Sequence[dict[str, Result]], arm: str) -> float:
    moving, *still = (
        float(np.percentile(np.concatenate([repeat[name].latencies for repeat in repeats]), 99))
        for name in (arm, "still_low", "still_high")
    )
    return moving / max(still)


def max_score_diff(repeats: Sequence[dict[str, Result]]) -> float:
    """Largest |a - b| / max(1, |a|) between the still engine and any other, request by request."""
    worst = 0.0
    for repeat in repeats:
        still = repeat["still_low"].outcome.scores
        for result in repeat.values():
            assert result.outcome.scores.keys() == still.keys()
            for name, scores in result.outcome.scores.items():
                difference = np.abs(still[name] - scores) / np.maximum(1.0, np.abs(still[name]))
                # Not Python's max, which takes NaN for nothing.
                worst = float(np.maximum(worst, difference.max()))
    return worst


@contextmanager
def engine_behind_slow_link() -> Iterator[tuple[LoadedEngine, CountingStore]]:
    """An engine whose rows are in a Redis of this run, behind a link of the stated speed."""
    directory = model_dir("abs", HISTORY, NUM_ITEMS)
    config = EngineConfig(
        directory, pool=POOL, scheduler=SchedulerConfig(max_num_batched_tokens=4096)
    )
    with rows_behind_link(directory, ROUND_TRIP_MS, LINK_BYTES_PER_S) as rows:
        store = CountingStore(rows.store(timeout_s=10.0))
        yield load_engine(config, SystemClock(), store), store


def main() -> None:
    """Runs all arms, in virtual and in real time."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="where a picture of the pool over time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    virtual, real = [], []
    with engine_behind_slow_link() as (engine, store):
        rate = sustainable_rate(engine)
        for seed in track(arguments.seeds, "repeats"):
            trace = make_trace(engine, seed, seconds, VIRTUAL_REQUESTS_PER_S)
            virtual.append(virtual_repeat(engine, trace))
            trace = make_trace(engine, seed, seconds, rate)
            real.append(real_repeat(engine, store, trace))
    if arguments.plot:
        draw(arguments.plot, {name: one.watch.history for name, one in real[0].items()})
    figures = {
        "p99_moving_over_worse_still_virtual": ratio(virtual, "moving")["ratio"],
        "p99_moving_over_worse_still_real": ratio(real, "moving")["ratio"],
        "p99_naive_over_worse_still_virtual": ratio(virtual, "naive")["ratio"],
        "refill_bytes_on_critical_path": _of_movers(real + virtual, "critical_bytes"),
        "failed_requests": sum(
            one.outcome.failures for repeat in real + virtual for one in repeat.values()
        ),
        "max_score_diff": max_score_diff(real),
        "ratios": {
            kind: {mover: ratio(repeats, mover) for mover in ("moving", "naive")}
            for kind, repeats in (("virtual", virtual), ("real", real))
        },
        "cells": cells(virtual, "virtual") + cells(real, "real"),
        "workload": {
            "splits": SPLITS, "seconds": seconds,
            "requests_per_s": {"virtual": VIRTUAL_REQUESTS_PER_S, "real": rate},
            "history": HISTORY, "users": USERS, "pool_bytes": POOL.pool_bytes,
            "items": NUM_ITEMS, "round_trip_ms": ROUND_TRIP_MS,
            "link_bytes_per_s": LINK_BYTES_PER_S, "profile": asdict(PROFILE),
        },
    }  # fmt: skip
    write_result(arguments.json, figures, arguments.seeds)


def _of_movers(repeats: Sequence[dict[str, Result]], field: str) -> int:
    """A figure of the engine's own mover, added up."""
    return sum(
        getattr(one, field)
        for repeat in repeats
        for name, one in repeat.items()
        if name.startswith("moving")
    )


if __name__ == "__main__":
    main()

"""What reuse is worth: the engine against the same engine with its caches off.

Both systems live in one process and share weights, kernels and front: JSON bytes in, parsed,
checked, hashed, scored, ranked, JSON bytes out. `helm` keeps KV and rows; `caches_off` gets each
request without a user, so that nothing may be reused, and keeps no row in the pool. Batches are
sorted by length. One thread computes.

Throughput is closed loop at saturation: the systems take turns over the same batches of visits,
and each pair of batches gives one ratio. Latency is open loop: the same Poisson arrivals, at 70 %
of the throughput of `caches_off`, segment by segment in turns. `flop_ceiling` is what a perfect
engine could gain: useful operations with caches off over those that remain with the KV that was
reused.

`ml100k` is shown beside the generated workloads and counts for nothing else: a bundled model whose
rows are 0.3 MB, visited by MovieLens-100K's users. Where the data cannot be had it is left out.

    python benchmarks/serving.py --json benchmarks/results/serving.json --seeds 1,2,3
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.flops import request_flops
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import Asked
from benchmarks.workloads import GENERATED, HEADLINE, MOVIELENS, Workload, movielens
from block_manager.pool_layout import PoolConfig
from helm_engine.body_codec import decode_request, encode_answer
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, ExecutorConfig, SchedulerConfig
from helm_engine.datasets.ml100k import DatasetError, load_ml100k
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.input_processor import PreparedRequest
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import Recommendation

LOAD = 0.7
"""Share of the throughput of `caches_off` at which latencies are taken."""
RESAMPLES = 1000


@dataclass
class System:
    """One engine with its front, and what it was seen doing."""

    name: str
    engine: LoadedEngine
    allows_reuse: bool
    history_tokens: int = 0
    cached_tokens: int = 0
    rows_requested: int = 0
    rows_resident: int = 0
    flops_without_reuse: float = 0.0
    flops: float = 0.0
    latencies_ms: list[list[float]] = field(default_factory=list)
    """Of each open-loop segment."""
    seconds: list[float] = field(default_factory=list)

    def submit(self, asked: Asked) -> PreparedRequest:
        """Parses a body and queues its request."""
        raw = asked.with_user if self.allows_reuse else asked.without_user
        body = decode_request(raw)
        now = time.perf_counter()
        prepared = self.engine.processor.process(body, f"request-{id(asked)}-{now}", now)
        self.engine.core.add_request(prepared.request)
        return prepared

    def answer(self, prepared: PreparedRequest) -> Recommendation:
        """Ranks and serialises."""
        if prepared.request.error is not None:
            raise prepared.request.error
        answer = build_recommendation(prepared, self.name)
        encode_answer(answer)
        return answer

    def count(self, answer: Recommendation) -> None:
        """Adds one measured answer's usage."""
        usage, config = answer.usage, self.engine.served.model_config
        self.history_tokens += usage.history_tokens
        self.cached_tokens += usage.cached_tokens
        self.rows_requested += usage.rows_requested
        self.rows_resident += usage.rows_resident
        context = usage.history_tokens
        scored = usage.candidates or config.num_items  # Without candidates, all items are.
        self.flops += request_flops(config, context, usage.cached_tokens, scored)
        self.flops_without_reuse += request_flops(config, context, 0, scored)


def build_system(name: str, workload: Workload, dtype: str, reuse: bool) -> System:
    """An engine over the workload's model."""
    config = EngineConfig(
        workload.model_dir(),
        pool=PoolConfig(workload.pool_bytes, emb_fraction=0.25 if reuse else 0.0),
        scheduler=SchedulerConfig(max_num_batched_tokens=8192),
        executor=ExecutorConfig(dtype=dtype),
    )
    return System(name, load_engine(config, SystemClock()), reuse)


def timed_batch(system: System, batch: list[Asked]) -> tuple[float, list[Recommendation]]:
    """Answers visits that are all there at once; seconds for each, and answers in their order."""
    started = time.perf_counter()
    prepared: dict[int, PreparedRequest] = {}
    # Sorted by length: what a system without paging would do against padding.
    for place in sorted(range(len(batch)), key=lambda place: batch[place].history):
        prepared[place] = system.submit(batch[place])
    system.engine.core.run_until_idle()
    answers = [system.answer(prepared[place]) for place in range(len(batch))]
    return (time.perf_counter() - started) / len(batch), answers


def measured_batches(
    visits: Iterator[Asked], systems: list[System], number: int, size: int
) -> Iterator[list[Asked]]:
    """Batches of returning visits; the first visits between them are answered unmeasured."""
    for _ in range(number):
        batch: list[Asked] = []
        while len(batch) < size:
            asked = next(visits)
            if asked.returning:
                batch.append(asked)
            else:
                for system in systems:
                    timed_batch(system, [asked])
        yield batch


def closed_loop(systems: list[System], batches: Iterator[list[Asked]]) -> None:
    """Both systems over the same batches in turns, the first to go alternating."""
    for number, batch in enumerate(batches):
        for system in systems if number % 2 else systems[::-1]:
            seconds, answers = timed_batch(system, batch)
            system.seconds.append(seconds)
            for answer in answers:
                system.count(answer)


def open_loop(system: System, segment: list[Asked], arrivals: list[float]) -> None:
    """Serves visits that arrive at their own times; latency counts from the arrival."""
    waiting = deque(zip(arrivals, segment, strict=True))
    running: dict[str, tuple[float, PreparedRequest]] = {}
    latencies: list[float] = []
    started = time.perf_counter()
    while waiting or running:
        now = time.perf_counter() - started
        while waiting and waiting[0][0] <= now:
            arrived, asked = waiting.popleft()
            prepared = system.submit(asked)
            running[prepared.request.request_id] = (arrived, prepared)
        if not running:
            time.sleep(max(0.0, waiting[0][0] - (time.perf_counter() - started)))
            continue
        for ended in system.engine.core.step():
            arrived, prepared = running.pop(ended.request_id)
            system.answer(prepared)
            latency = time.perf_counter() - started - arrived
            latencies.append(latency * 1e3)
    system.latencies_ms.append(latencies)


def spread(values: np.ndarray[Any, Any], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the median."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    medians: list[float] = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975]).tolist()
    return medians


def p99_ratio(
    ours: list[list[float]], theirs: list[list[float]], seed: int = 0
) -> tuple[float, list[float]]:
    """Ratio of the two p99, and its 95 % bootstrap interval.

    Both served the same segments, and those are resampled: requests of one wait for each other.
    """

    def ratio(picked: Sequence[int]) -> float:
        above, below = (np.concatenate([one[i] for i in picked]) for one in (ours, theirs))
        return float(np.quantile(above, 0.99) / np.quantile(below, 0.99))

    picks = np.random.default_rng(seed).integers(0, len(ours), (RESAMPLES, len(ours)))
    interval: list[float] = np.quantile([ratio(pick) for pick in picks], [0.025, 0.975]).tolist()
    return ratio(range(len(ours))), interval


def run_workload(
    workload: Workload, seeds: list[int], dtype: str, quick: bool, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The two cells of a workload, and the ratios between them."""
    batches = 3 if quick else workload.batches
    segments = 1 if quick else 4
    segment = workload.segment // 4 if quick else workload.segment
    task = progress.add_task(workload.name, total=len(seeds) * (batches + segments))
    latencies: dict[str, list[list[float]]] = {"helm": [], "caches_off": []}
    totals: dict[str, System] = {}
    times: dict[str, list[float]] = {"helm": [], "caches_off": []}
    for seed in seeds:
        systems = [
            build_system("helm", workload, dtype, reuse=True),
            build_system("caches_off", workload, dtype, reuse=False),
        ]
        visits = workload.visits(seed)
        for asked in islice(visits, 3 * workload.users):  # Until most seats have come once.
            timed_batch(systems[0], [asked])
        plain = measured_batches(visits, systems, batches, workload.batch)
        closed_loop(systems, _tracked(plain, progress, task))
        rate = LOAD / float(np.median(systems[1].seconds))
        rng = np.random.default_rng(seed)
        parts = measured_batches(visits, systems, segments, segment)
        for number, part in enumerate(_tracked(parts, progress, task)):
            arrivals = np.cumsum(rng.exponential(1.0 / rate, len(part))).tolist()
            for system in systems if number % 2 else systems[::-1]:
                open_loop(system, part, arrivals)
        for system in systems:
            system.engine.core.check_integrity()
            latencies[system.name] += system.latencies_ms
            times[system.name] += system.seconds
            _add(totals, system)
    return _figures(workload, dtype, totals, times, latencies)


def _tracked(
    batches: Iterator[list[Asked]], progress: Progress, task: Any
) -> Iterator[list[Asked]]:
    for batch in batches:
        yield batch
        progress.advance(task)


def _add(totals: dict[str, System], system: System) -> None:
    if system.name not in totals:
        totals[system.name] = system
        return
    total = totals[system.name]
    for name in (
        "history_tokens", "cached_tokens", "rows_requested", "rows_resident",
        "flops", "flops_without_reuse",
    ):  # fmt: skip
        setattr(total, name, getattr(total, name) + getattr(system, name))


def _figures(
    workload: Workload,
    dtype: str,
    totals: dict[str, System],
    times: dict[str, list[float]],
    latencies: dict[str, list[list[float]]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    ours = totals["helm"]
    ceiling = ours.flops_without_reuse / ours.flops
    cells = [
        {
            "workload": workload.name,
            "system": name,
            "dtype": dtype,
            "requests_per_s": 1.0 / float(np.median(times[name])),
            "p50_ms": float(np.quantile(np.concatenate(latencies[name]), 0.5)),
            "p99_ms": float(np.quantile(np.concatenate(latencies[name]), 0.99)),
            "cached_token_share": total.cached_tokens / total.history_tokens,
            "row_hit_share": total.rows_resident / total.rows_requested,
            "flop_ceiling": ceiling,
        }
        for name, total in totals.items()
    ]
    pairs = np.array(times["caches_off"]) / np.array(times["helm"])
    throughput = float(np.median(pairs))
    p99, p99_95 = p99_ratio(latencies["helm"], latencies["caches_off"])
    return cells, {
        "throughput_vs_batched": throughput,
        "throughput_vs_batched_95": spread(pairs),
        "p99_vs_batched": p99,
        "p99_vs_batched_95": p99_95,
        "share_of_flop_ceiling": throughput / ceiling,
        "pairs_of_batches": len(pairs),
        "open_loop_requests": sum(map(len, latencies["helm"])),
    }


def main() -> None:
    """Runs all workloads and writes their cells."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", type=Path, help="a copy of MovieLens-100K; default: download it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workloads = list(GENERATED)
    try:
        workloads.append(movielens(load_ml100k(arguments.data)))
    except DatasetError as error:
        if arguments.data is not None:
            raise
        print(f"{MOVIELENS} is left out: {error}", file=sys.stderr)
    cells: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        for workload in workloads:
            found, ratios[workload.name] = run_workload(
                workload, arguments.seeds, "float32", arguments.quick, progress
            )
            cells += found
    figures = {
        "cells": cells,
        "ratios": ratios[HEADLINE],
        "ratios_by_workload": ratios,
        "threads": 1,
        "load_share": LOAD,
    }
    write_result(arguments.json, figures, arguments.seeds)


if __name__ == "__main__":
    main()

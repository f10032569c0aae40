"""What bfloat16 gains and what it costs: the engine in bf16 against the same engine in fp32.

Both see the same visits of returning users in turns, with their caches on. The error is that of
final scores over all candidates, relative to max(1, |score|), with how well the order of the
candidates survives. The weights are random: a trained model's scores spread differently.

    python benchmarks/bfloat16.py --json benchmarks/results/bfloat16.json
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.report import benchmark_parser, write_result
from benchmarks.serving import build_system, measured_batches, spread, timed_batch
from benchmarks.workloads import GENERATED, Workload
from helm_engine.protocol import Recommendation

BATCHES = 12
TOP = 10


def compare_scores(exact: Recommendation, rough: Recommendation) -> tuple[float, float, float]:
    """Largest and mean relative error, and the share of the best ten that stays among them."""
    by_place = {item.index: item.score for item in rough.data}
    want = np.array([item.score for item in exact.data])
    got = np.array([by_place[item.index] for item in exact.data])
    errors = np.abs(got - want) / np.maximum(1.0, np.abs(want))
    best = {item.index for item in exact.data[:TOP]}
    kept = len(best & {item.index for item in rough.data[:TOP]}) / TOP
    return float(errors.max()), float(errors.mean()), kept


def run_workload(
    workload: Workload, seeds: list[int], batches: int, progress: Progress
) -> dict[str, Any]:
    """One cell: speed and error over all seeds."""
    task = progress.add_task(workload.name, total=len(seeds) * batches)
    ratios: list[float] = []
    errors: list[tuple[float, float, float]] = []
    for seed in seeds:
        systems = [
            build_system("float32", workload, "float32", reuse=True),
            build_system("bfloat16", workload, "bfloat16", reuse=True),
        ]
        visits = workload.visits(seed)
        for asked in islice(visits, 2 * workload.users):
            for system in systems:
                timed_batch(system, [asked])
        measured = measured_batches(visits, systems, batches, workload.batch)
        for number, batch in enumerate(measured):
            order = systems if number % 2 else systems[::-1]
            done = {system.name: timed_batch(system, batch) for system in order}
            ratios.append(done["float32"][0] / done["bfloat16"][0])
            pairs = zip(done["float32"][1], done["bfloat16"][1], strict=True)
            errors += [compare_scores(exact, rough) for exact, rough in pairs]
            progress.advance(task)
    table = np.array(errors)
    return {
        "workload": workload.name,
        "throughput_vs_float32": float(np.median(ratios)),
        "throughput_vs_float32_95": spread(np.array(ratios)),
        "largest_relative_error": float(table[:, 0].max()),
        "mean_relative_error": float(table[:, 1].mean()),
        "top_10_agreement": float(table[:, 2].mean()),
        "requests": len(errors),
    }


def main() -> None:
    """Runs the generated workloads of `serving.py` in both dtypes."""
    arguments = benchmark_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    batches = 2 if arguments.quick else BATCHES
    with Progress() as progress:
        cells = [
            run_workload(workload, arguments.seeds, batches, progress) for workload in GENERATED
        ]
    write_result(arguments.json, {"cells": cells, "threads": 1}, arguments.seeds)


if __name__ == "__main__":
    main()

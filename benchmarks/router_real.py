"""Two real engines behind one front: which routing policy finds what they hold, and P99.

Returning users on `dlrmv3-mini-abs` (640 events, 256 candidates) come open-loop. One engine's pool
has room for the KV of about half of them, both together for all. One server for each policy, with
two engines of one thread each; they take turns on the same visits, round by round, so that a slow
minute of the machine hits each of them. What is counted of the engines' own totals is what the
measured rounds added to them.

    python benchmarks/router_real.py --json benchmarks/results/router_real.json --seeds 1,2,3
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.open_loop import Storm, answer_each, offer
from benchmarks.overload_users import Seats, mini_stream
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir
from benchmarks.server_process import ServerProcess, started

POLICIES = ("joint", "round_robin", "least_load")
USERS = 64
AT_ONCE = 4
WARM_UP_VISITS = 3
UTILISATION = 0.5
"""Of what the server with `round_robin` answers in a closed loop."""
FLAGS = (
    "--num-engines", "2", "--pool-bytes", "96MiB", "--emb-fraction", "0.25",
    "--max-num-batched-tokens", "4096",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
ROUND_S, ROUNDS = 5.0, 8
QUICK_ROUND_S, QUICK_ROUNDS = 2.0, 2
DEADLINE_MS = 10_000.0
"""Far away: every request is answered."""
_TOTALS = (
    "helm:prefix_cache_queries_total",
    "helm:prefix_cache_hits_total",
    "helm:emb_cache_queries_total",
    "helm:emb_cache_hits_total",
)


@dataclass(slots=True)
class Arm:
    """A server with one policy, and what was measured there."""

    policy: str
    server: ServerProcess
    seats: Seats
    begins: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    failures: int = 0

    def totals(self) -> Counter[str]:
        """The engines' totals, added up, and the requests of each."""
        with urllib.request.urlopen(f"{self.server.address}/metrics") as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in _TOTALS:
                    found[sample.name] += int(sample.value)
                elif sample.name == "helm:engine_requests_total":
                    found[f"engine {sample.labels['engine']}"] += int(sample.value)
        return found

    def figures(self) -> dict[str, Any]:
        """What the measured rounds came to."""
        grown = self.totals() - self.begins
        asked, hit, rows, row_hits = (grown[name] for name in _TOTALS)
        engines = [grown[name] for name in sorted(grown) if name.startswith("engine ")]
        return {
            "policy": self.policy,
            "requests": len(self.latencies_ms),
            "failures": self.failures,
            "cached_token_share": round(hit / asked, 4),
            "row_hit_share": round(row_hits / rows, 4),
            "rows_missed": rows - row_hits,
            "p50_ms": round(float(np.percentile(self.latencies_ms, 50)), 2),
            "p99_ms": round(float(np.percentile(self.latencies_ms, 99)), 2),
            "requests_by_engine": engines,
        }


def run(seed: int, quick: bool, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """All policies on the visits of one seed."""
    round_s, rounds = (QUICK_ROUND_S, QUICK_ROUNDS) if quick else (ROUND_S, ROUNDS)
    directory = model_dir("abs", 640)
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        arms = []
        for policy in POLICIES:
            flags = (*FLAGS, "--routing-policy", policy)
            server = stack.enter_context(started(directory, *flags, environment=ENVIRONMENT))
            arms.append(Arm(policy, server, Seats(mini_stream(USERS, seed), USERS)))
        closed_loop = {}
        for arm in arms:
            for _ in range(WARM_UP_VISITS):
                asked = pool.submit(answer_each, arm.server.address, arm.seats.take_all(), AT_ONCE)
                closed_loop[arm.policy] = asked.result()
            arm.begins = arm.totals()
        rate = UTILISATION * closed_loop["round_robin"]
        for place in range(rounds):
            times = np.sort(rng.uniform(0.0, round_s, rng.poisson(rate * round_s))).tolist()
            seats = rng.integers(0, USERS, len(times)).tolist()
            # Who goes first changes: what one leaves in the machine's caches, the next one finds.
            for arm in arms[place % len(arms) :] + arms[: place % len(arms)]:
                arrivals = list(zip(times, seats, strict=True))
                storm = Storm(arm.server.address, arm.seats.coming(), DEADLINE_MS, arrivals)
                outcome = pool.submit(offer, storm).result()
                arm.seats.answered(outcome.answered)
                arm.latencies_ms += [1e3 * seconds for seconds in outcome.latencies]
                arm.failures += sum(status != 200 for status in outcome.statuses)
        cells = [arm.figures() for arm in arms]
        for arm in arms:
            if status := arm.server.stop():
                raise SystemExit(f"the server with {arm.policy} ended with status {status}")
    return {"seed": seed, "requests_per_s": round(rate, 1), "cells": cells}


def main() -> None:
    """Runs each seed."""
    arguments = benchmark_parser(__doc__).parse_args()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        runs = [run(seed, arguments.quick, pool) for seed in arguments.seeds]
    medians = {
        policy: {
            name: round(float(np.median([one["cells"][place][name] for one in runs])), 4)
            for name in ("cached_token_share", "row_hit_share", "p50_ms", "p99_ms")
        }
        for place, policy in enumerate(POLICIES)
    }
    others = POLICIES[1:]
    summary = {
        "p99_joint_over": {
            other: round(medians["joint"]["p99_ms"] / medians[other]["p99_ms"], 3)
            for other in others
        },
        "policies": medians,
        "failures": sum(cell["failures"] for one in runs for cell in one["cells"]),
    }
    workload = {
        "users": USERS, "history": 640, "utilisation": UTILISATION, "flags": FLAGS,
    }  # fmt: skip
    write_result(arguments.json, {**summary, "runs": runs, "workload": workload}, arguments.seeds)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""What it takes to pick an engine: 32 engines, requests of 1,000 distinct rows and 4,096 tokens.

Every engine holds half of the rows and the histories of some users, so most requests find their KV
somewhere and some nowhere. Timed are `Dispatcher.route` alone, and with the hashes of the history
before it, which a front makes once for each request; both in turns, in one loop. Requests are
answered a few decisions later, so queues differ.

    python benchmarks/router_decision.py --json benchmarks/results/router_decision.json
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import numpy.typing as npt

from benchmarks.report import benchmark_parser, write_result
from block_manager.block_hash import BlockHash, hash_blocks
from block_manager.events import BlockStored, KVEventBatch, RowEventBatch, RowsStored
from helm_engine.engine_choice import DEFAULT_COSTS
from router.cost import Work
from router.dispatcher import Assignment, Dispatcher

ENGINES = 32
NUM_ROWS = 1_000_000
TOKENS, BLOCK_TOKENS, FEATURES = 4096, 16, 2
CANDIDATES = 256
HISTORY_ROWS = 1000 - CANDIDATES
"""Distinct ones of a history."""
USERS = 256
HELD_SHARE = 0.8
"""Of the users, those whose history an engine holds."""
OUTSTANDING = 64
"""Requests that wait for their answers."""
DECISIONS, QUICK_DECISIONS = 20_000, 2_000

Histories = list[npt.NDArray[np.int64]]


def fleet(seed: int, works: list[Work], rng: np.random.Generator) -> Dispatcher:
    """Engines that hold half of the rows each, and each held history on one of them."""
    dispatcher = Dispatcher(seed=seed)
    for number in range(ENGINES):
        name = str(number)
        dispatcher.add_engine(name, DEFAULT_COSTS, num_rows=NUM_ROWS, num_positions=NUM_ROWS)
        rows = np.flatnonzero(rng.random(NUM_ROWS) < 0.5).astype("<u4").tobytes()
        batch = RowEventBatch(0.0, [RowsStored(rows)], NUM_ROWS)
        dispatcher.residency.apply_rows(name, batch)
    for work in works[: int(HELD_SHARE * len(works))]:
        stored = BlockStored(list(work.block_hashes), None, [], BLOCK_TOKENS, None, "GPU", None)
        name = str(int(rng.integers(ENGINES)))
        dispatcher.residency.apply_kv(name, KVEventBatch(0.0, [stored]))
    return dispatcher


def requests(rng: np.random.Generator) -> tuple[list[Work], Histories]:
    """A request of each user, and what its hashes cover."""
    works, histories = [], []
    for user in range(USERS):
        distinct = rng.choice(NUM_ROWS, HISTORY_ROWS + CANDIDATES, replace=False)
        rows = rng.permutation(np.resize(distinct[:HISTORY_ROWS], TOKENS))
        history = np.column_stack([rows, np.arange(TOKENS)])
        histories.append(history)
        works.append(
            Work(
                hash_blocks(BlockHash(bytes(32)), history, BLOCK_TOKENS),
                BLOCK_TOKENS,
                TOKENS,
                rows,
                distinct[HISTORY_ROWS:],
                user_tag=user + 1,
            )
        )
    return works, histories


def measure(seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Microseconds of a decision, without and with the hashes of the history."""
    rng = np.random.default_rng(seed)
    works, histories = requests(rng)
    dispatcher = fleet(seed, works, rng)
    running: deque[Assignment] = deque()
    plain_us: list[float] = []
    hashed_us: list[float] = []
    number = QUICK_DECISIONS if quick else DECISIONS
    gc.collect()
    gc.freeze()  # As the serving processes do.
    for place, user in enumerate(rng.integers(USERS, size=number).tolist()):
        work, now = works[user], place / 1e3
        began = time.perf_counter_ns()
        if place % 2:
            hashes = hash_blocks(BlockHash(bytes(32)), histories[user], BLOCK_TOKENS)
            work = replace(work, block_hashes=hashes)
        running.append(dispatcher.route(work, now))
        (hashed_us if place % 2 else plain_us).append((time.perf_counter_ns() - began) / 1e3)
        if len(running) > OUTSTANDING:
            done = running.popleft()
            dispatcher.finished(done, now, service_ms=done.charged_ms)
    return {"decision_us": _quantiles(plain_us), "decision_with_hash_us": _quantiles(hashed_us)}


def _quantiles(microseconds: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(microseconds, (0.5, 0.99))
    return {"p50": float(p50), "p99": float(p99)}


def main() -> None:
    """Measures with each seed; of several the largest figure is told."""
    arguments = benchmark_parser(__doc__).parse_args()
    cells = [{"seed": seed, **measure(seed, arguments.quick)} for seed in arguments.seeds]
    figures: dict[str, Any] = {"engines": ENGINES, "rows": HISTORY_ROWS + CANDIDATES}
    figures |= {"tokens": TOKENS, "cells": cells}
    for name in ("decision_us", "decision_with_hash_us"):
        figures[name] = {part: max(one[name][part] for one in cells) for part in ("p50", "p99")}
        print(name, figures[name])
    write_result(arguments.json, figures, arguments.seeds)


if __name__ == "__main__":
    main()

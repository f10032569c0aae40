"""The EMB tenant's row policy against LRU, LFU and Belady's optimum on streams of row lookups.

Hit shares of a cache with slots for 1 %, 5 % and 20 % of the rows that a stream looks up, real and
synthetic streams (`row_streams.py`). What a hit is and what the yardsticks may do is said in
`cache_yardsticks.py`: the optimum knows the future and may refuse a row. First lookups count as
misses, so nothing reaches 100 %. Ours is the engine's own `EmbeddingCache`, one plan a step, pages
of one slot. A cell is lost where LRU or LFU hits more often.

    python benchmarks/row_policy.py --json benchmarks/results/row_policy.json --seeds 1,2,3
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
from rich.progress import track

from benchmarks.cache_yardsticks import Int64Array, Stream, lfu_hits, lru_hits, optimal_hits
from benchmarks.report import benchmark_parser, write_result
from benchmarks.row_streams import (
    drift,
    ml100k_events,
    ml100k_histories,
    scan,
    sudden_change,
    zipf,
)
from block_manager.embedding_cache import EmbeddingCache
from helm_engine.datasets.ml100k import load_ml100k

SHARES = (0.01, 0.05, 0.2)
NUM_LOOKUPS, QUICK_LOOKUPS = 500_000, 100_000
SYNTHETIC: dict[str, Callable[[int, int], Stream]] = {
    "zipf_0.8": partial(zipf, 0.8),
    "zipf_1.0": partial(zipf, 1.0),
    "zipf_1.2": partial(zipf, 1.2),
    "drift": drift,
    "scan": scan,
    "sudden_change": sudden_change,
}
AFTER_CHANGE = slice(5, 6)
"""Of the tenths of a stream, the one after the middle."""


def helm_hits(stream: Stream, capacity: int) -> Int64Array:
    """Hits of each step in the engine's own cache: int64 [steps]."""
    cache = EmbeddingCache(np.arange(capacity), 1, stream.num_rows)
    hits = []
    for step in stream.steps:
        plan = cache.plan(step.row_ids, step.times)
        cache.commit(plan)
        hits.append(int(plan.resident.sum()))
    cache.check_integrity()
    return np.array(hits, dtype=np.int64)


POLICIES = {"helm": helm_hits, "lru": lru_hits, "lfu": lfu_hits, "optimum": optimal_hits}


def streams(seeds: list[int], num_lookups: int) -> Iterator[tuple[str, Stream]]:
    """Real streams once, synthetic ones for every seed."""
    dataset = load_ml100k()
    yield "ml100k_events", ml100k_events(dataset)
    yield "ml100k_histories", ml100k_histories(dataset)
    for name, make in SYNTHETIC.items():
        for seed in seeds:
            yield name, make(num_lookups, seed)


def hit_shares(stream: Stream, capacity: int) -> dict[str, Any]:
    """Each policy's hits over lookups, of the whole stream and of its tenths."""
    lookups = np.array([len(step.row_ids) for step in stream.steps])
    edges = np.arange(10) * len(lookups) // 10
    shares: dict[str, Any] = {}
    for name, hits_of in POLICIES.items():
        hits = hits_of(stream, capacity)
        tenths = np.add.reduceat(hits, edges) / np.add.reduceat(lookups, edges)
        shares[name] = {"whole": hits.sum() / lookups.sum(), "tenths": tenths}
    return shares


def cell_of(name: str, share: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one stream at one size."""
    found = {one: float(np.mean([run[one]["whole"] for run in runs])) for one in POLICIES}
    to_optimum = [run["helm"]["whole"] / run["optimum"]["whole"] for run in runs]
    cell: dict[str, Any] = {
        "stream": name,
        "slots_share": share,
        **{f"{one}_hit_share": found[one] for one in POLICIES},
        "helm_vs_optimum": float(np.mean(to_optimum)),
        "helm_vs_optimum_range": [min(to_optimum), max(to_optimum)],
        "better": [one for one in ("lru", "lfu") if found[one] > found["helm"]],
    }
    if name == "sudden_change":
        cell["hit_share_after_change"] = {
            one: float(np.mean([run[one]["tenths"][AFTER_CHANGE] for run in runs]))
            for one in POLICIES
        }
    return cell


def main() -> None:
    """Replays every stream at every size and writes the hit shares."""
    arguments = benchmark_parser(__doc__).parse_args()
    num_lookups = QUICK_LOOKUPS if arguments.quick else NUM_LOOKUPS
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    total = 2 + len(SYNTHETIC) * len(arguments.seeds)
    for name, stream in track(streams(arguments.seeds, num_lookups), total=total):
        # Of the last seed; those of others differ by a few rows.
        sizes[name] = {
            "steps": len(stream.steps),
            "lookups": stream.num_lookups,
            "distinct_rows": stream.num_distinct,
        }
        for share in SHARES:
            capacity = max(1, round(share * stream.num_distinct))
            runs.setdefault((name, share), []).append(hit_shares(stream, capacity))
    cells = [cell_of(name, share, found) for (name, share), found in runs.items()]
    write_result(arguments.json, {"streams": sizes, "cells": cells}, arguments.seeds)


if __name__ == "__main__":
    main()

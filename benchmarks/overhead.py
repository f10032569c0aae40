"""Time that a batch spends outside the model: scheduling, bookkeeping, and what surrounds them.

A batch is 8 users with 4,096 cached tokens and 256 candidates each (`dlrmv3-mini-abs`). What is
left of a batch's time when the model's own (gathering rows, embedding, layers, scoring) is taken
away is `ms_per_batch`: admission, prefix lookup, block tables, row plan, the step's arrays, commit.
With `_with_parse_and_ipc` the same batch starts as 8 JSON bodies on the event loop and ends as 8
JSON answers of the best 32 items: parsing, checks, hashing, the hop to the engine's thread and
back, ranking, serialising. Both are measured in turns. Blocks hold 32 tokens, as NVIDIA's pages do,
whose manager takes 2 to 8 ms for lookup and allocation alone (recsys-examples, on an H100's host);
the engine's default of 16 is shown beside it.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
from rich.progress import track

from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir, returning_visits
from block_manager.pool_layout import PoolConfig
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, SchedulerConfig
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.protocol import decode_request, encode_recommendation

USERS = 8
HISTORY = 4096
BLOCK_TOKENS = 32
TOP_K = 32
"""Items that each answer brings back of the 256 that were scored."""
REPEATS = 60
QUICK_REPEATS = 12
PARTS = 4
"""The core alone and the whole way take turns so many times."""


class ModelClock:
    """Adds up the time within the model's own methods."""

    def __init__(self, engine: LoadedEngine) -> None:
        self.seconds = 0.0
        model, arena = engine.runner.model, engine.runner.arena
        for owner, name in (
            (arena, "read_rows"), (model, "embed"), (model, "encode"), (model, "score"),
        ):  # fmt: skip
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call

    def outside(self, work: Callable[[], object]) -> float:
        """Milliseconds that the work spends outside the model."""
        self.seconds = 0.0
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started - self.seconds) * 1e3


def cached_bodies(seed: int) -> list[bytes]:
    """The last visits of users whose history has just reached 4,096 events."""
    bodies: dict[bytes, bytes] = {}
    visits = returning_visits("abs", HISTORY, returns=0, users=USERS, seed=seed)
    while len(bodies) < USERS:
        asked = next(visits)
        body = json.loads(asked.with_user) | {"top_k": TOP_K}
        bodies[asked.without_user] = json.dumps(body).encode()
    return list(bodies.values())


def engine_over(directory: Path, block_tokens: int) -> LoadedEngine:
    """An engine with room for all users' KV."""
    config = EngineConfig(
        directory,
        pool=PoolConfig(pool_bytes=1 << 30, block_tokens=block_tokens),
        scheduler=SchedulerConfig(max_num_batched_tokens=8192),
    )
    return load_engine(config, SystemClock())


async def measure(seed: int, repeats: int, block_tokens: int) -> tuple[list[float], list[float]]:
    """Milliseconds outside the model, of the core alone and of the whole way."""
    engine = engine_over(model_dir("abs", HISTORY), block_tokens)
    clock, core = ModelClock(engine), engine.core
    bodies = cached_bodies(seed)

    def core_alone(number: int) -> float:
        prepared = [
            engine.processor.process(decode_request(body), f"core-{number}-{place}", 0.0)
            for place, body in enumerate(bodies)
        ]

        def run() -> None:
            for one in prepared:
                core.add_request(one.request)
            core.run_until_idle()

        outside = clock.outside(run)
        if number >= 0:
            assert all(one.request.cached_tokens == HISTORY for one in prepared)
        return outside

    core_alone(-1)  # Fills the cache.
    gc.collect()
    gc.freeze()  # As the server does after its start.
    alone, whole = [], []
    for _ in track(range(PARTS), description=f"blocks of {block_tokens}, seed {seed}"):
        alone += [core_alone(number) for number in range(repeats // PARTS)]
        recommender = AsyncRecommender(engine, SystemClock())

        async def answer(body: bytes, recommender: AsyncRecommender = recommender) -> bytes:
            return encode_recommendation(await recommender.recommend(decode_request(body)))

        for number in range(1 + repeats // PARTS):
            clock.seconds = 0.0
            started = time.perf_counter()
            await asyncio.gather(*map(answer, bodies))
            if number:  # The first call of a thread is not measured.
                whole.append((time.perf_counter() - started - clock.seconds) * 1e3)
        recommender.close()
    core.check_integrity()
    return alone, whole


def figures_for(block_tokens: int, seeds: list[int], repeats: int) -> dict[str, Any]:
    """Medians and quartiles over all seeds."""
    alone: list[float] = []
    whole: list[float] = []
    for seed in seeds:
        of_core, of_all = asyncio.run(measure(seed, repeats, block_tokens))
        alone += of_core
        whole += of_all
    return {
        "ms_per_batch": float(np.median(alone)),
        "ms_per_batch_quartiles": np.quantile(alone, [0.25, 0.75]).tolist(),
        "ms_per_batch_with_parse_and_ipc": float(np.median(whole)),
        "ms_per_batch_with_parse_and_ipc_quartiles": np.quantile(whole, [0.25, 0.75]).tolist(),
        "block_tokens": block_tokens,
        "batches": len(alone),
    }


def main() -> None:
    """Measures and writes medians with their spread."""
    arguments = benchmark_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    repeats = QUICK_REPEATS if arguments.quick else REPEATS
    figures = figures_for(BLOCK_TOKENS, arguments.seeds, repeats)
    default = PoolConfig().block_tokens
    ablation = {f"blocks_of_{default}": figures_for(default, arguments.seeds, repeats)}
    size = {"users": USERS, "cached_tokens": HISTORY, "candidates": 256, "top_k": TOP_K}
    write_result(arguments.json, {**figures, **size, "ablation": ablation}, arguments.seeds)


if __name__ == "__main__":
    main()

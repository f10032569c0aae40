"""Time that a batch spends outside the model: scheduling, bookkeeping, and what surrounds them.

A batch is 8 users with 4,096 cached tokens and 256 candidates each (`dlrmv3-mini-abs`). What is
left of a batch's time when the model's own (gathering rows, embedding, layers, scoring) is taken
away is `ms_per_batch`: admission, prefix lookup, block tables, row plan, the step's arrays, commit.
With `_with_parse_and_ipc` the same batch starts as 8 JSON bodies on the event loop and ends as 8
JSON answers of the best 32 items: parsing, checks, hashing, the hop to the engine's process and
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
import uvloop
from rich.progress import track

from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir, returning_visits
from block_manager.pool_layout import PoolConfig
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.body_codec import decode_request, encode_answer
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, SchedulerConfig
from helm_engine.core_process import run_core_process
from helm_engine.engine_client import EngineClient
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.engine_supervisor import EngineSupervisor

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
    """Adds up the time within the model's own methods, in memory that processes share."""

    def __init__(self, seconds: Synchronized[float]) -> None:
        self._seconds = seconds

    def watch(self, engine: LoadedEngine) -> None:
        """Counts what this engine's model does from now on."""
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
                self._seconds.value += time.perf_counter() - started

        return call

    @contextmanager
    def outside(self, milliseconds: list[float]) -> Iterator[None]:
        """Appends what the block spends outside the model."""
        self._seconds.value = 0.0
        started = time.perf_counter()
        yield
        milliseconds.append((time.perf_counter() - started - self._seconds.value) * 1e3)


def load_timed(clock: ModelClock, config: EngineConfig) -> LoadedEngine:
    """An engine on one thread whose model is timed."""
    torch.set_num_threads(1)
    engine = load_engine(config, SystemClock())
    clock.watch(engine)
    return engine


def start_timed(clock: ModelClock, config: EngineConfig) -> EngineClient:
    """Such an engine in its own process, as the server runs it."""
    return EngineClient(config, 60.0, partial(run_core_process, load=partial(load_timed, clock)))


def cached_bodies(seed: int) -> list[bytes]:
    """The last visits of users whose history has just reached 4,096 events."""
    bodies: dict[bytes, bytes] = {}
    visits = returning_visits("abs", HISTORY, returns=0, users=USERS, seed=seed)
    while len(bodies) < USERS:
        asked = next(visits)
        body = json.loads(asked.with_user) | {"top_k": TOP_K}
        bodies[asked.without_user] = json.dumps(body).encode()
    return list(bodies.values())


def config_of(directory: Path, block_tokens: int) -> EngineConfig:
    """An engine with room for all users' KV."""
    return EngineConfig(
        directory,
        pool=PoolConfig(pool_bytes=1 << 30, block_tokens=block_tokens),
        scheduler=SchedulerConfig(max_num_batched_tokens=8192),
    )


class CoreAlone:
    """The core in this process; requests are prepared before the time is taken."""

    def __init__(self, config: EngineConfig, bodies: list[bytes]) -> None:
        self.clock = ModelClock(get_context("spawn").Value("d", 0.0))
        self.engine = load_timed(self.clock, config)
        self.bodies = bodies
        self.milliseconds: list[float] = []
        self._run([])  # Fills the cache.

    def _run(self, milliseconds: list[float]) -> bool:
        prepared = [
            self.engine.processor.process(decode_request(body), f"core-{place}", 0.0)
            for place, body in enumerate(self.bodies)
        ]
        with self.clock.outside(milliseconds):
            for one in prepared:
                self.engine.core.add_request(one.request)
            self.engine.core.run_until_idle()
        return all(one.request.cached_tokens == HISTORY for one in prepared)

    def measure(self, repeats: int) -> None:
        """Runs the batch so many times."""
        for _ in range(repeats):
            assert self._run(self.milliseconds)


class WholeWay:
    """From JSON to JSON, with the core in its own process."""

    def __init__(self, config: EngineConfig, bodies: list[bytes]) -> None:
        self.clock = ModelClock(get_context("spawn").Value("d", 0.0))
        self.supervisor = EngineSupervisor(config, partial(start_timed, self.clock))
        self.recommender = AsyncRecommender(EngineFleet([self.supervisor]))
        self.bodies = bodies
        self.milliseconds: list[float] = []

    async def start(self) -> None:
        """Starts the core and fills its cache."""
        await self.supervisor.start()
        await asyncio.gather(*map(self._answer, self.bodies))

    async def _answer(self, body: bytes) -> bytes:
        return encode_answer(await self.recommender.recommend(decode_request(body)))

    async def measure(self, repeats: int) -> None:
        """Runs the batch so many times."""
        for _ in range(repeats):
            with self.clock.outside(self.milliseconds):
                await asyncio.gather(*map(self._answer, self.bodies))


async def measure(seed: int, repeats: int, block_tokens: int) -> tuple[list[float], list[float]]:
    """Milliseconds outside the model, of the core alone and of the whole way."""
    config, bodies = config_of(model_dir("abs", HISTORY), block_tokens), cached_bodies(seed)
    alone, whole = CoreAlone(config, bodies), WholeWay(config, bodies)
    await whole.start()
    gc.collect()
    gc.freeze()  # As the server does after its start.
    for _ in track(range(PARTS), description=f"blocks of {block_tokens}, seed {seed}"):
        alone.measure(repeats // PARTS)
        await whole.measure(repeats // PARTS)
    alone.engine.core.check_integrity()
    assert await whole.supervisor.close()
    return alone.milliseconds, whole.milliseconds


def figures_for(block_tokens: int, seeds: list[int], repeats: int) -> dict[str, Any]:
    """Medians and quartiles over all seeds."""
    alone: list[float] = []
    whole: list[float] = []
    for seed in seeds:
        of_core, of_all = uvloop.run(measure(seed, repeats, block_tokens))
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

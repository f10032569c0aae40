"""The two ways to move the boundary that `moving.py` compares, in virtual and in real time.

`bounded` is the engine's: a few pages between two steps, rows refilled in the background. `naive`
is what the paper warns of: all pages at once, and the step that follows waits until the new pages
are filled. Both run the same scheduler, pool and executors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from block_manager.refill import RefillConfig, RefillThrottle
from helm_engine.clock import VirtualClock
from helm_engine.config import SchedulerConfig
from helm_engine.engine_core import EngineCore
from helm_engine.engine_loader import LoadedEngine
from helm_engine.scheduler import Scheduler, build_scheduler
from model_executor.capabilities import step_rules
from model_executor.cost_profile import CostProfile
from model_executor.executor import Executor
from model_executor.host_store import HostStore
from model_executor.model_runner import ModelRunner
from model_executor.simulated_executor import SimulatedExecutor
from model_executor.step import ModelOutput, SchedulerOutput, StepTimings

UNLIMITED = RefillConfig(cap_bytes_per_s=1e15, burst_bytes=1 << 50)


class CountingStore:
    """A host store that knows how many bytes were read on the thread that steps."""

    def __init__(self, store: HostStore) -> None:
        self._store = store
        self.stepping = threading.get_ident()
        self.step_bytes = 0

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return self._store.num_rows

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of the store (int64 [n]): float32 [n, D]; raises as it does."""
        rows = self._store.read_rows(row_ids)
        if threading.get_ident() == self.stepping:
            self.step_bytes += rows.nbytes
        return rows


class DemandCounter:
    """Passes steps on and adds up the bytes that their requests needed from the host."""

    def __init__(self, executor: Executor, row_bytes: int) -> None:
        self._executor = executor
        self._row_bytes = row_bytes
        self.bytes = 0

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """See `Executor.execute`."""
        self.bytes += self._row_bytes * step.rows.num_missing
        return self._executor.execute(step)


class NaiveSimulation(SimulatedExecutor):
    """Loads a refill within the step that plans it."""

    refill_bytes = 0

    def __init__(self, profile: CostProfile, clock: VirtualClock, row_bytes: int) -> None:
        super().__init__(profile, clock)
        self._naive_clock, self._naive_profile, self._row_bytes = clock, profile, row_bytes

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """See `Executor.execute`."""
        refill = step.refill
        if refill is None:
            return super().execute(step)
        profile = self._naive_profile
        wait = profile.round_trip_ms + profile.row_miss_ms * len(refill)
        self._naive_clock.advance(wait / 1e3)
        self.refill_bytes += self._row_bytes * len(refill)
        output = super().execute(replace(step, refill=None))
        spent = output.timings_ms
        timings = StepTimings(spent.load + wait, spent.prefill, spent.score)
        return replace(output, timings_ms=timings, refilled=refill)


class NaiveRunner:
    """Likewise, on the device."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """See `Executor.execute`."""
        refill = step.refill
        if refill is None:
            return self._runner.execute(step)
        pages = self._runner.arena.rows

        def land(first: int, rows: torch.Tensor) -> None:
            pages.write(torch.from_numpy(refill.slots[first : first + len(rows)]), rows)

        self._runner.loader.load(refill.row_ids, land)
        return replace(self._runner.execute(replace(step, refill=None)), refilled=refill)


def make_scheduler(engine: LoadedEngine, emb_fraction: float, naive: bool) -> Scheduler:
    """A scheduler with empty books over a loaded engine's pool, split as asked for."""
    served = engine.served
    layout = replace(served.layout, num_emb_pages=served.layout.emb_pages_of(emb_fraction))
    config: SchedulerConfig = served.config.scheduler
    if naive:
        config = replace(config, max_pages_per_step=layout.num_pages)
    rules = step_rules(served.model_config, served.capabilities)
    scheduler = build_scheduler(config, layout, served.model_config.num_rows, rules)
    if naive:
        scheduler.refills.throttle = RefillThrottle(UNLIMITED)
    return scheduler


def simulated_core(
    engine: LoadedEngine, profile: CostProfile, emb_fraction: float, naive: bool
) -> tuple[EngineCore, VirtualClock, Callable[[], int]]:
    """A core in virtual time, its clock, and how many refilled bytes steps have waited for."""
    clock = VirtualClock()
    scheduler = make_scheduler(engine, emb_fraction, naive)
    row_bytes = engine.served.layout.row_bytes
    if naive:
        executor = NaiveSimulation(profile, clock, row_bytes)
        return EngineCore(scheduler, executor, clock), clock, lambda: executor.refill_bytes
    return EngineCore(scheduler, SimulatedExecutor(profile, clock), clock), clock, lambda: 0

"""A trace through the engine in virtual time: its core, scheduler and pool, on a priced device.

Nothing of the engine is rebuilt here. What is simulated is the device, which takes the time that a
cost profile says, and the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import nan

import numpy as np
import numpy.typing as npt

from block_manager.page_value import PageValueEstimator
from block_manager.pool_layout import PoolConfig, PoolLayout, plan_layout
from block_manager.refill import RefillConfig
from helm_engine.clock import VirtualClock
from helm_engine.config import SchedulerConfig
from helm_engine.controller.allocation_controller import AllocationController
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.engine_control import EngineControl, build_control
from helm_engine.engine_core import EngineCore
from helm_engine.exceptions import HelmError
from helm_engine.page_values import page_value_estimator
from helm_engine.request import Request
from helm_engine.scheduler import build_scheduler
from helm_engine.simulator.open_loop import Timer, VirtualTimer, offer
from helm_engine.simulator.scaling import CoarseKV, CoarsePageValues, check_scale, sampled_rows
from helm_engine.simulator.step_log import StepLog
from helm_engine.simulator.trace import RULES, Trace
from helm_engine.simulator.workloads import Setting
from model_executor.capabilities import StepRules
from model_executor.cost_profile import CostProfile
from model_executor.row_loader import CHUNK_ROWS
from model_executor.simulated_executor import SimulatedExecutor
from model_executor.step import Float32Array

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Split = tuple[float, float]
"""Seconds after the start, and the EMB share of the pages that is asked for then."""


@dataclass(frozen=True, slots=True)
class EngineModel:
    """The engine that a trace is run through."""

    setting: Setting
    """Sizes of the pool and of what is in it."""
    profile: CostProfile
    """What work costs on the device."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    refill: RefillConfig | None = None
    """None = the engine's own budget, on a link that carries what the profile says."""

    controller: ControllerConfig = field(default_factory=ControllerConfig)
    """Who moves the boundary; by default nobody but a schedule. Its SLO is the setting's."""
    scale: int = 1
    """Pages and rows that one of the simulated ones stands for, a power of two up to 64."""
    watches_worth: bool = True
    """Whether a controller is told what a page is worth, as by an engine with a cost profile."""
    rules: StepRules = RULES
    """Of the model that the requests are made for."""

    def __post_init__(self) -> None:
        """Checks the scale.

        Raises:
            ValueError: it is none.
        """
        check_scale(self.scale)

    @property
    def coarse_profile(self) -> CostProfile:
        """What work costs where a row stands for `scale` rows."""
        one, scale = self.profile, self.scale
        return replace(
            one, row_miss_ms=one.row_miss_ms * scale, row_copy_ms=one.row_copy_ms * scale
        )

    def refill_budget(self) -> RefillConfig:
        """How much of the link background loads may take."""
        if self.refill is not None:
            return self.refill
        if not self.profile.row_miss_ms:
            return RefillConfig()
        rows_per_s = 1e3 / self.profile.row_miss_ms
        return RefillConfig(link_bytes_per_s=rows_per_s * self.setting.row_bytes)

    def layout(self, emb_fraction: float) -> PoolLayout:
        """The pool, split; in pages and rows that stand for `scale` of the device's.

        Raises:
            PoolTooSmallError: it cannot hold what one request may need.
            ValueError: the share is not within 0..1.
        """
        setting, scale = self.setting, self.scale
        return plan_layout(
            PoolConfig(setting.pool_bytes, emb_fraction, setting.block_tokens * scale),
            kv_bytes_per_token=setting.kv_bytes_per_token,
            row_bytes=setting.row_bytes * scale,
            max_context_tokens=setting.max_history,
            staging_rows=-(-self.scheduler.max_num_batched_tokens // scale),
        )

    def scheduler_config(self) -> SchedulerConfig:
        """That of the engine, with pages that stand for `scale` of the device's."""
        pages = self.scheduler.max_pages_per_step
        if pages is not None:
            pages = -(-pages // self.scale)
        return replace(self.scheduler, max_pages_per_step=pages)

    def page_values(self, layout: PoolLayout, num_rows: int) -> PageValueEstimator:
        """What watches the worth of the pages of a layout, over so many rows."""
        if self.scale == 1:
            return page_value_estimator(self.profile, layout, num_rows)
        return CoarsePageValues(self.coarse_profile, layout, num_rows, self.scale)


class SimulatedEngine:
    """An idle engine in virtual time."""

    def __init__(
        self,
        model: EngineModel,
        emb_fraction: float,
        controller: AllocationController | None = None,
    ) -> None:
        """Splits the pool.

        Args:
            model: sizes, costs, and who moves the boundary.
            emb_fraction: EMB share of the pages, 0..1; floors apply.
            controller: moves the boundary instead of the one that the model names.

        Raises:
            PoolTooSmallError: it cannot hold what one request may need.
            ValueError: the share is not within 0..1, or the controller is unknown.
        """
        self.clock = VirtualClock()
        setting, scale, layout = model.setting, model.scale, model.layout(emb_fraction)
        num_rows = setting.num_items if scale == 1 else sampled_rows(setting, scale)[1]
        is_controlled = model.controller.name is not None or controller is not None
        is_watched = model.watches_worth and is_controlled
        self.scheduler = build_scheduler(
            model.scheduler_config(),
            layout,
            num_rows,
            model.rules,
            page_values=model.page_values(layout, num_rows) if is_watched else None,
            refill=model.refill_budget(),
            rows_stand_for=scale,
        )
        if scale > 1:
            self.scheduler.kv = CoarseKV(self.scheduler.kv.pool, setting.block_tokens, scale)
        executor = SimulatedExecutor(model.coarse_profile, self.clock, CHUNK_ROWS // scale)
        self.log = StepLog(executor, self.scheduler, self.clock, scale)
        control = (
            build_control(replace(model.controller, slo_ms=setting.slo_ms), self.scheduler, 0.0)
            if controller is None
            else EngineControl(self.scheduler, controller, setting.slo_ms, 0.0)
        )
        self.core = EngineCore(self.scheduler, self.log, self.clock, control)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a trace's requests. NaN or 0 where one was refused or failed."""

    trace: Trace
    latencies_ms: FloatArray
    """From when each was due to its end, float64 [n]."""
    cached_tokens: Int64Array
    """Of each history, those whose KV was reused, int64 [n]."""
    rows_requested: Int64Array
    """Distinct rows that each needed when it was first scheduled, int64 [n]; at a scale, those of
    the sample times the scale, as all rows here."""
    rows_resident: Int64Array
    """Those of them that were in the pool, int64 [n]."""
    service_ms: FloatArray
    """Of the device's time, the share that was spent on each, float64 [n]; see `StepLog`."""
    steps: dict[str, FloatArray]
    """Columns of the step log."""
    num_pages: int
    num_moved_pages: int
    """In both directions, the warm-up included."""


class Ledger:
    """Writes down how each request ends; see `open_loop.Audience`."""

    def __init__(self, number: int) -> None:
        self.latencies_ms = np.full(number, nan)
        self.cached = np.zeros(number, dtype=np.int64)
        self.requested = np.zeros(number, dtype=np.int64)
        self.resident = np.zeros(number, dtype=np.int64)

    def ended(self, request: Request, now: float) -> None:
        """A request has finished or failed."""
        if request.error is not None:
            return
        place = int(request.request_id)
        self.latencies_ms[place] = (now - request.arrival) * 1e3
        self.cached[place] = request.cached_tokens
        self.requested[place] = request.rows_requested
        self.resident[place] = request.rows_resident
        # Nobody reads them, and a request may be kept.
        request.scores = _NO_SCORES

    def refused(self, request: Request, error: HelmError) -> None:
        """The engine did not take a request: its latency stays NaN."""


_NO_SCORES: Float32Array = np.empty((0, 1), dtype=np.float32)


def arrivals(trace: Trace) -> Iterator[tuple[float, Callable[[], Request]]]:
    """When each request of a trace comes, seconds after the start, and what makes it then."""
    for place, arrival in enumerate(trace.arrivals.tolist()):
        yield arrival, partial(trace.request, place)


def simulate(
    trace: Trace,
    model: EngineModel,
    emb_fraction: float,
    schedule: Sequence[Split] = (),
    controller: AllocationController | None = None,
) -> Result:
    """Runs all requests of a trace open-loop, the warm-up included.

    Args:
        trace: it is not changed.
        model: an engine of the trace's setting and scale.
        emb_fraction: EMB share of the pages at the start, 0..1; floors apply.
        schedule: when the boundary is asked to go where from then on.
        controller: moves the boundary instead of the one that the model names.

    Raises:
        PoolTooSmallError: the pool cannot hold what one request may need.
        ValueError: a share is not within 0..1, or the trace was drawn for another scale.
    """
    scale = model.scale
    if trace.scale != scale:
        raise ValueError(f"scale: the trace was drawn for {trace.scale}, the engine is at {scale}")
    engine = SimulatedEngine(model, emb_fraction, controller)
    timer = VirtualTimer(engine.clock)
    return run_trace(trace, engine.core, timer, engine.log, schedule)


def run_trace(
    trace: Trace,
    core: EngineCore,
    timer: Timer,
    log: StepLog,
    schedule: Sequence[Split] = (),
) -> Result:
    """Runs all requests of a trace open-loop through an idle engine, a simulated or a real one.

    Args:
        trace: of the engine's scale; it is not changed.
        core: its executor is the log.
        timer: the clock that the core reads.
        log: empty.
        schedule: when the boundary is asked to go where from then on.

    Raises:
        ValueError: a share is not within 0..1.
    """
    ledger, scale, scheduler = Ledger(len(trace)), trace.scale, core.scheduler
    moves = [(when, partial(core.set_target, share)) for when, share in schedule]
    begin = timer.now()
    offer(core, timer, arrivals(trace), ledger, moves)
    core.check_nothing_leaked()
    return Result(
        trace=trace,
        latencies_ms=ledger.latencies_ms,
        cached_tokens=ledger.cached,
        rows_requested=ledger.requested * scale,
        rows_resident=ledger.resident * scale,
        service_ms=np.array([log.service_ms[str(place)] for place in range(len(trace))]),
        steps=log.columns(begin),
        num_pages=scheduler.pool.num_pages * scale,
        num_moved_pages=scheduler.boundary.num_moved_pages * scale,
    )

"""One workload, seed and device, to be run again and again: all that is the same for everybody.

Whoever moves the boundary starts from the same split, has the same warm-up, the same refill and the
same slew limit. A static split, too, is reached from there: it takes seconds of the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from block_manager.refill import RefillConfig
from helm_engine.controller.allocation_controller import AllocationController
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.recording import Recording
from helm_engine.simulator.schedule import Schedule, constant
from helm_engine.simulator.simulation import EngineModel, FloatArray, Result, simulate
from helm_engine.simulator.trace import Trace, make_trace
from helm_engine.simulator.workloads import Workload
from model_executor.cost_profile import CostProfile

_STEPS = 50
"""Shares are counted in fiftieths: the grid of static splits has a step of 0.02."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard is looked for what would have been best."""

    scale: int = 1
    """Where what is found is measured."""
    search_scale: int = 16
    """Where it is looked for: cheaper, less exact."""
    coarse_step: int = 2
    """Every so manieth share of the grid is run at the scale of the search."""
    tolerance: float = 0.05
    """Shares whose P99 there is within so much of the least are run at the other scale..."""
    most_verified: int = 3
    """...but no more than so many."""
    evaluations: int = 30
    """Schedules that are tried at the scale of the search..."""
    measured: int = 3
    """...and how many of them are measured at the other."""


def p99_of(result: Result) -> float:
    """The 99th percentile of what came after the warm-up; see `p99_ms`."""
    trace = result.trace
    return p99_ms(result.latencies_ms[trace.arrivals >= trace.workload.warm_up_s])


def served_ms(result: Result) -> FloatArray:
    """Of the device's time, what was spent on each request, float64 [n]; NaN where one failed."""
    return np.where(np.isnan(result.latencies_ms), np.nan, result.service_ms)


def p99_ms(latencies_ms: FloatArray) -> float:
    """The 99th percentile if who failed (NaN) was slower than any; infinite if one in 100 did."""
    if not len(latencies_ms):
        return np.inf
    ordered = np.sort(latencies_ms)  # NaN comes last.
    place = 0.99 * (len(ordered) - 1)
    low, high = ordered[int(np.floor(place))], ordered[int(np.ceil(place))]
    value = low + (high - low) * (place % 1.0)
    return float("inf") if np.isnan(value) else float(value)


@dataclass
class Case:
    """What does not depend on who moves the boundary; traces and runs of schedules are kept."""

    workload: Workload
    profile: CostProfile
    seed: int
    start: float = 0.5
    """EMB share of the pages at the start."""
    config: ControllerConfig = field(default_factory=ControllerConfig)
    """Bounds and slew limit."""
    refill: RefillConfig | None = None
    """See `EngineModel`."""
    recording: Recording | None = None
    """Recorded requests instead of drawn ones, and the engine that took them; the workload tells
    them as regimes."""
    _traces: dict[int, Trace] = field(default_factory=dict)
    _runs: dict[tuple[Schedule, int], Result] = field(default_factory=dict)

    def changed(self, **changes: Any) -> Case:
        """The same requests under another configuration or refill."""
        return replace(self, **changes, _runs={})

    def retold(self, workload: Workload) -> Case:
        """The same recorded requests and runs under other regimes, with the same warm-up."""
        return replace(self, workload=workload, _traces={})

    def trace(self, scale: int) -> Trace:
        """The requests, as an engine of that scale needs them."""
        if scale not in self._traces:
            self._traces[scale] = (
                make_trace(self.workload, self.seed, scale=scale)
                if self.recording is None
                else self.recording.trace(self.workload, scale)
            )
        return self._traces[scale]

    def model(self, scale: int, name: str | None = None) -> EngineModel:
        """The engine, with a controller by name."""
        setting = self.workload.resolved_setting
        config = replace(self.config, name=name)
        if self.recording is not None:
            engine = self.recording.engine(self.profile)
            return replace(engine, setting=setting, controller=config, scale=scale)
        return EngineModel(
            setting, self.profile, refill=self.refill, controller=config, scale=scale
        )

    def run(self, schedule: Schedule, scale: int) -> Result:
        """Runs a schedule, once."""
        key = (schedule, scale)
        if key not in self._runs:
            trace = self.trace(scale)
            targets = schedule.targets(self.start, self.config.slew_per_s, trace.seconds)
            self._runs[key] = simulate(trace, self.model(scale), self.start, targets)
        return self._runs[key]

    def run_controller(self, controller: str | AllocationController, scale: int) -> Result:
        """Runs a controller, by the name that the registry knows it by, or itself."""
        trace = self.trace(scale)
        if isinstance(controller, str):
            return simulate(trace, self.model(scale, controller), self.start)
        return simulate(trace, self.model(scale), self.start, controller=controller)

    def static_p99(self, share: float, scale: int) -> float:
        """The P99 of a static split."""
        return p99_of(self.run(constant(share), scale))

    def reached(self, share: float, scale: int) -> float:
        """The EMB share that floors leave of one that is asked for."""
        layout = self.model(scale).layout(self.start)
        return layout.emb_pages_of(share) / layout.num_pages

    def grid(self, step: int = 1) -> list[float]:
        """Every so manieth share of the grid of 0.02 within the bounds, and its last one.

        Of shares that floors make the same one is there.
        """
        low, high = (
            round(bound * _STEPS) for bound in (self.config.least_share, self.config.largest_share)
        )
        shares = [place / _STEPS for place in range(low, high + 1)]
        reached = {self.reached(share, 1): share for share in reversed(shares)}
        grid = sorted(reached.values())
        return grid if step == 1 else sorted({*grid[::step], grid[-1]})

"""What became of requests that were routed over many engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from helm_engine.simulator.figures import figures, figures_by_regime, fraction_over_time
from helm_engine.simulator.simulation import FloatArray, Int64Array, Result


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """What became of a trace's requests, and on which engine."""

    result: Result
    """Of all engines together; columns of the step log are those of one engine after another, and
    pages are those of one engine, so that shares are means over engines."""
    names: tuple[str, ...]
    """Of the engines."""
    engine_of: Int64Array
    """Place of the engine that each request was sent to, int64 [n]."""
    router_of: Int64Array
    """Who sent it, int64 [n]."""
    predicted_ms: FloatArray
    """Latency that the router expected, float64 [n]."""
    steps_of: list[dict[str, FloatArray]]
    """Columns of each engine's step log."""

    @property
    def is_counted(self) -> npt.NDArray[np.bool_]:
        """Whether each request came after the warm-up, [n]."""
        trace = self.result.trace
        return np.asarray(trace.arrivals >= trace.workload.warm_up_s)

    @property
    def busy(self) -> FloatArray:
        """Of each engine, device time over the time after the warm-up, float64 [engines].

        It is that of the requests that came then, so it is above 1 where they took longer.
        """
        trace, counted = self.result.trace, self.is_counted
        spent_ms = np.bincount(
            self.engine_of[counted], self.result.service_ms[counted], len(self.steps_of)
        )
        return np.asarray(spent_ms / 1e3 / (trace.seconds - trace.workload.warm_up_s))

    @property
    def load_spread(self) -> float:
        """The busiest engine's device time over the mean of all, after the warm-up; 1 = even."""
        busy = self.busy
        return float(busy.max() / busy.mean()) if busy.any() else 1.0

    @property
    def predicted_over_actual(self) -> FloatArray:
        """Latency that the router expected over what it was, of each request that ended well."""
        latencies = self.result.latencies_ms
        counted = self.is_counted & ~np.isnan(latencies)
        return np.asarray(self.predicted_ms[counted] / latencies[counted])

    def steps_with_engines(self) -> dict[str, FloatArray]:
        """Columns of all step logs, and the place of the engine that made each step."""
        lengths = [len(steps["began_s"]) for steps in self.steps_of]
        engines = np.repeat(np.arange(len(self.names), dtype=np.float64), lengths)
        return {"engine": engines, **self.result.steps}

    def as_json(self) -> dict[str, Any]:
        """All figures of a simulation."""
        requests = np.bincount(self.engine_of[self.is_counted], minlength=len(self.names))
        columns = zip(self.names, requests.tolist(), self.busy.tolist(), self.steps_of, strict=True)
        return {
            **asdict(figures(self.result)),
            "num_moved_pages": self.result.num_moved_pages,
            "load_spread": self.load_spread,
            "regimes": [asdict(one) for one in figures_by_regime(self.result)],
            "engines": [
                {
                    "name": name,
                    "requests": number,
                    "busy": busy,
                    "fraction_over_time": fraction_over_time(replace(self.result, steps=steps)),
                }
                for name, number, busy, steps in columns
            ],
        }

"""What became of requests that were routed over many engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from helm_engine.simulator.simulation import FloatArray, Int64Array, Result


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """What became of a trace's requests, and on which engine."""

    result: Result
    """Of all engines together; columns of the step log are those of one engine after another, and
    pages are those of one engine, so that shares are means over engines."""
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

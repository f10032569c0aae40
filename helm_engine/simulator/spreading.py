"""Requests over several engines by user alone, and what that makes of latencies.

A user goes to one engine, by a consistent hash, so that KV is found again; rows are held by every
engine that is asked for them. So each engine can be run by itself; with routers that know what
engines hold they cannot, which `cluster` is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from helm_engine.simulator.hindsight import Case, p99_ms
from helm_engine.simulator.schedule import constant
from helm_engine.simulator.simulation import FloatArray, Int64Array, Result, simulate
from helm_engine.simulator.trace import Trace

_GOLDEN = np.int64(-0x61C8864680B583EB)


@dataclass(frozen=True, slots=True)
class SpreadFigures:
    """What so many engines do, each with the same split."""

    engines: int
    emb_fraction: float
    """Asked for of each."""
    busiest_share: float
    """Of all requests, those of the engine that has most."""
    busy: float
    """Share of the time that the busiest engine's device works."""
    p50_ms: float
    p99_ms: float
    """Infinite if one request in 100 failed."""
    slo_share: float
    """Of all requests, those that ended well within the SLO."""
    kv_hit_rate: float
    emb_hit_rate: float


class Spread:
    """A recorded trace on so many engines."""

    def __init__(self, case: Case, engines: int) -> None:
        """Takes a case over a recording.

        Raises:
            ValueError: there is no engine.
        """
        if engines < 1:
            raise ValueError(f"engines: must be at least 1, not {engines}")
        assert case.recording is not None
        self._case = case
        self._engines = engines
        places = engine_of(case.recording.users, engines)
        self._members = [np.flatnonzero(places == one) for one in range(engines)]
        self._traces: dict[int, list[Trace]] = {}

    def run(self, share: float, scale: int) -> list[Result]:
        """Each engine that has a request, from where the case starts to a static split."""
        case = self._case
        if self._engines == 1:
            return [case.run(constant(share), scale)]
        assert case.recording is not None
        if scale not in self._traces:
            self._traces[scale] = [
                case.recording.trace(case.workload, scale, one) for one in self._members if len(one)
            ]
        model = case.model(scale)
        seconds = case.workload.ends[-1]
        targets = constant(share).targets(case.start, case.config.slew_per_s, seconds)
        return [simulate(one, model, case.start, targets) for one in self._traces[scale]]

    def best_static(self, scale: int, first_step: int) -> float:
        """The share with the least P99, halving steps from `first_step` of the grid down to 2.

        It finds the best one of these where P99 has one valley.
        """
        grid: list[float] = self._case.grid()
        tried: dict[int, float] = {}

        def cost(place: int) -> float:
            if place not in tried:
                tried[place] = p99_of_all(self.run(grid[place], scale))
            return tried[place]

        places = sorted({*range(0, len(grid), first_step), len(grid) - 1})
        best, step = min(places, key=cost), first_step
        while step > 2:
            step //= 2
            beside = [place for place in (best - step, best + step) if 0 <= place < len(grid)]
            best = min([best, *beside], key=cost)
        return float(grid[best])

    def figures(self, share: float, scale: int) -> SpreadFigures:
        """What comes of a static split."""
        results = self.run(share, scale)
        latencies = _latencies(results)
        slo_ms, warm_up = self._case.model(scale).setting.slo_ms, self._case.workload.warm_up_s
        well = latencies[~np.isnan(latencies)]
        counted = [(one, one.trace.arrivals >= warm_up) for one in results]
        sizes = [int(mine.sum()) for _, mine in counted]
        seconds = self._case.workload.ends[-1] - warm_up
        busy = [float(one.service_ms[mine].sum()) / 1e3 / seconds for one, mine in counted]
        sums = {
            name: sum(int(getattr(one, name)[mine].sum()) for one, mine in counted)
            for name in ("cached_tokens", "rows_requested", "rows_resident")
        }
        tokens = sum(
            int(one.trace.lengths[mine & ~np.isnan(one.latencies_ms)].sum())
            for one, mine in counted
        )
        return SpreadFigures(
            engines=self._engines,
            emb_fraction=share,
            busiest_share=max(sizes) / max(1, sum(sizes)),
            busy=max(busy),
            p50_ms=float(np.median(well)) if len(well) else np.inf,
            p99_ms=p99_ms(latencies),
            slo_share=float((well <= slo_ms).sum()) / max(1, len(latencies)),
            kv_hit_rate=sums["cached_tokens"] / max(1, tokens),
            emb_hit_rate=sums["rows_resident"] / max(1, sums["rows_requested"]),
        )


def p99_of_all(results: Sequence[Result]) -> float:
    """The 99th percentile over all engines; see `p99_ms`."""
    return p99_ms(_latencies(results))


def _latencies(results: Sequence[Result]) -> FloatArray:
    """Of all that came after the warm-up."""
    return np.concatenate(
        [one.latencies_ms[one.trace.arrivals >= one.trace.workload.warm_up_s] for one in results]
    )


def engine_of(users: Int64Array, engines: int) -> Int64Array:
    """Engine of each request, 0..engines - 1, int64 [n].

    A user's is Lamping and Veach's jump consistent hash ("A fast, minimal memory, consistent hash
    algorithm", 2014): with one engine more, one user in so many moves, and only to the new one.
    Requests without a user are spread likewise, each for itself.

    Args:
        users: hashed ids; 0 = none; int64 [n].
        engines: at least 1.
    """
    nobody = users == 0
    turn = np.cumsum(nobody) * _GOLDEN
    found: Int64Array = _jump(np.where(nobody, turn, users).view(np.uint64), engines)
    return found


@njit(nogil=True, cache=True)
def _jump(keys: Any, engines: Any) -> Any:
    found = np.empty(len(keys), dtype=np.int64)
    for place in range(len(keys)):
        key, engine, following = keys[place], 0, 0
        while following < engines:
            engine = following
            key = key * np.uint64(2862933555777941757) + np.uint64(1)
            rest = float((key >> np.uint64(33)) + np.uint64(1))
            following = int((engine + 1) * (float(1 << 31) / rest))
        found[place] = engine
    return found

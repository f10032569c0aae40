"""Figures and the picture of `real_burst.py`, from what its client and its servers wrote down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.burst_requests import Recording
from benchmarks.cpu_use import MOST_BUSY
from benchmarks.recorded_client import Outcome
from helm_engine.simulator.figures import figures
from helm_engine.simulator.hindsight import p99_ms
from helm_engine.simulator.simulation import Result

FloatArray = npt.NDArray[np.float64]

BOOTSTRAPS = 1000
_ROLES = ("front", "core", "redis", "link", "client")


@dataclass(frozen=True, slots=True)
class Boundary:
    """The split over time: EMB's share of the pages."""

    seconds: list[float]
    """Since the replay began."""
    committed: list[float]
    target: list[float]


@dataclass(frozen=True)
class Run:
    """One arm of one repeat."""

    arm: str
    recording: Recording
    outcome: Outcome
    boundary: Boundary
    status: int
    """With which the server ended."""

    @property
    def is_void(self) -> bool:
        """Whether the machine was too busy for it to count."""
        return self.outcome.cpu_shares["machine"] > MOST_BUSY

    @cached_property
    def counted(self) -> npt.NDArray[np.bool_]:
        """The requests that came after the warm-up, [n]."""
        return self.recording.trace.arrivals >= self.recording.warm_up_s

    @cached_property
    def latencies_ms(self) -> FloatArray:
        """Of the counted requests, NaN where there was no answer, float64 [n]."""
        mine: FloatArray = np.array(self.outcome.latencies_ms)[self.counted]
        return mine

    @property
    def failed(self) -> int:
        """Requests, of the warm-up too, that got no answer."""
        return sum(status != "200" for status in self.outcome.statuses)

    @property
    def slo_share(self) -> float:
        """Of all counted requests those that were answered within the SLO."""
        within = self.latencies_ms <= self.recording.trace.setting.slo_ms
        return float(within.sum() / self.counted.sum())

    def hit_share(self, hits: str, queries: str) -> float:
        """Of what counted requests asked for, by the server's own account."""
        usage = [one for one, mine in zip(self.outcome.usage, self.counted, strict=True) if mine]
        asked = sum(one.get(queries, 0) for one in usage)
        return sum(one.get(hits, 0) for one in usage) / max(1, asked)

    def regime_p99_ms(self) -> list[float]:
        """Of the requests of each regime, by the time at which they came; NaN without any."""
        trace = self.recording.trace
        latencies = np.array(self.outcome.latencies_ms)
        found, begin = [], self.recording.warm_up_s
        for end in trace.workload.ends:
            mine = latencies[(trace.arrivals >= begin) & (trace.arrivals < end)]
            found.append(p99_ms(mine) if len(mine) else float("nan"))
            begin = end
        return found


def boundary_of(
    decisions: Sequence[Mapping[str, Any]], began: float, emb_fraction: float
) -> Boundary:
    """The split over time, from a server's decision log.

    Args:
        decisions: its lines; none where nobody decides.
        began: when the replay did, on the clock of the log.
        emb_fraction: where the split was before the first of them.
    """
    mine = [one for one in decisions if one["at"] >= began]
    return Boundary(
        [0.0, *(one["at"] - began for one in mine)],
        [emb_fraction, *(one["committed"] for one in mine)],
        [emb_fraction, *(one["target"] for one in mine)],
    )


def summary(
    repeats: Sequence[Mapping[str, Run]],
    statics: Sequence[str],
    simulated: Mapping[str, Sequence[Result]],
) -> dict[str, Any]:
    """All figures; those that compare are of repeats without a void run.

    Args:
        repeats: the runs of each, by arm.
        statics: arms whose split stays.
        simulated: the same repeats in virtual time, by arm.
    """
    valid = [one for one in repeats if not any(run.is_void for run in one.values())]
    every = [run for one in repeats for run in one.values()]
    movers = [name for name in repeats[0] if name not in statics]
    return {
        "p99_over_best_static": {name: ratio(valid, name, statics) for name in movers},
        "best_static": best_static(valid, statics) if valid else None,
        "valid_repeats": len(valid),
        "void_runs": sum(run.is_void for run in every),
        "runs": len(every),
        "failed_requests": sum(run.failed for run in every),
        "max_score_diff": max_score_diff(repeats),
        "most_busy": max(run.outcome.cpu_shares["machine"] for run in every),
        "cells": [cell(name, valid or repeats, simulated[name]) for name in repeats[0]],
        "each_run": [
            _of_run(place, run) for place, one in enumerate(repeats) for run in one.values()
        ],
    }


def best_static(repeats: Sequence[Mapping[str, Run]], statics: Sequence[str]) -> str:
    """The arm with the least P99 over all repeats together."""
    return min(statics, key=lambda name: _pooled_p99(repeats, name))


def ratio(
    repeats: Sequence[Mapping[str, Run]], mover: str, statics: Sequence[str]
) -> dict[str, Any] | None:
    """P99 over that of the best static split, with 95 % of a bootstrap over repeats.

    The requests of all repeats are taken together, and each draw has its own best static split.
    """
    if not repeats:
        return None
    draws = np.random.default_rng(0).integers(len(repeats), size=(BOOTSTRAPS, len(repeats)))
    drawn = [_pooled_ratio([repeats[place] for place in draw], mover, statics) for draw in draws]
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = _pooled_ratio(repeats, mover, statics)
    return {"ratio": value, "interval": [float(low), float(high)]}


def _pooled_ratio(
    repeats: Sequence[Mapping[str, Run]], mover: str, statics: Sequence[str]
) -> float:
    return _pooled_p99(repeats, mover) / min(_pooled_p99(repeats, name) for name in statics)


def _pooled_p99(repeats: Sequence[Mapping[str, Run]], arm: str) -> float:
    return p99_ms(np.concatenate([repeat[arm].latencies_ms for repeat in repeats]))


def cell(
    arm: str, repeats: Sequence[Mapping[str, Run]], simulated: Sequence[Result]
) -> dict[str, Any]:
    """An arm's figures over repeats."""
    runs = [repeat[arm] for repeat in repeats]
    pooled = np.concatenate([run.latencies_ms for run in runs])
    told = [figures(one) for one in simulated]
    return {
        "arm": arm,
        "p50_ms": float(np.nanmedian(pooled)),
        "p99_ms": p99_ms(pooled),
        "p99_ms_of_each_repeat": [p99_ms(run.latencies_ms) for run in runs],
        "slo_share": float(np.mean([run.slo_share for run in runs])),
        "kv_hit_share": _mean(run.hit_share("cached_tokens", "history_tokens") for run in runs),
        "row_hit_share": _mean(run.hit_share("rows_resident", "rows_requested") for run in runs),
        "emb_fraction": _mean(_mean_share(run.boundary, run.recording) for run in runs),
        "failed_requests": sum(run.failed for run in runs),
        "cpu_shares": {
            role: _mean(run.outcome.cpu_shares[role] for run in runs)
            for role in (*_ROLES, "ours", "machine")
        },
        "sent_late_p99_ms": float(
            np.quantile(np.concatenate([run.outcome.late_ms for run in runs]), 0.99)
        ),
        "simulated": {
            "p50_ms": [one.p50_ms for one in told],
            "p99_ms": [one.p99_ms for one in told],
        },
    }


def _of_run(place: int, run: Run) -> dict[str, Any]:
    return {
        "repeat": place,
        "arm": run.arm,
        "void": run.is_void,
        "p99_ms": p99_ms(run.latencies_ms),
        "p99_ms_of_each_regime": run.regime_p99_ms(),
        "slo_share": run.slo_share,
        "failed_requests": run.failed,
        "cpu_shares": run.outcome.cpu_shares,
        "boundary": {
            "seconds": [round(one, 3) for one in run.boundary.seconds],
            "committed": [round(one, 4) for one in run.boundary.committed],
        },
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _mean_share(boundary: Boundary, recording: Recording) -> float:
    """Of EMB, over the time that counts."""
    grid = np.arange(recording.warm_up_s, recording.trace.seconds, 0.1)
    return float(np.interp(grid, boundary.seconds, boundary.committed).mean())


def max_score_diff(repeats: Sequence[Mapping[str, Run]]) -> float:
    """Largest |a - b| / max(1, |a|) between the first arm and any other, request by request.

    Requests that failed in either are left out; they are counted elsewhere.
    """
    worst = 0.0
    for repeat in repeats:
        first, *others = (run.outcome.scores for run in repeat.values())
        for other in others:
            for a, b in zip(first, other, strict=True):
                if a is not None and b is not None:
                    difference = np.abs(a - b) / np.maximum(1.0, np.abs(a))
                    # Not Python's max, which takes NaN for nothing.
                    worst = float(np.maximum(worst, difference.max()))
    return worst


def draw(path: Path, runs: Mapping[str, Run]) -> None:
    """The split and the latencies of each arm over time, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(runs), 5.5), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for (name, run), (split, latency) in zip(runs.items(), axes.T, strict=True):
        trace, boundary = run.recording.trace, run.boundary
        begin = 0.0
        for place, end in enumerate(trace.workload.ends):
            for one in (split, latency):
                if place % 2:
                    one.axvspan(begin, end, color="#d98324", alpha=0.15, linewidth=0.0)
            begin = end
        seconds = [*boundary.seconds, trace.seconds]
        for values, style in ((boundary.committed, "-"), (boundary.target, ":")):
            split.plot(seconds, [*values, values[-1]], style, color="#3b6fb6")
        split.set_title(name)
        split.set_ylim(0.0, 1.0)
        latency.plot(trace.arrivals, run.outcome.latencies_ms, ".", color="#3b6fb6", markersize=2)
        latency.axhline(trace.setting.slo_ms, color="grey", linestyle="--", linewidth=1.0)
        latency.set_yscale("log")
        latency.set_xlabel("seconds; shaded: bursts of regulars")
    axes[0][0].set_ylabel("EMB share of the pages")
    axes[1][0].set_ylabel("latency, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

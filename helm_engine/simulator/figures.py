"""Figures of a simulation: of all that was measured, and of each regime."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from helm_engine.simulator.simulation import FloatArray, Result

_TRACE_POINTS = 2000
"""Points at most of what is shown over time."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests that came within one stretch of time."""

    name: str
    seconds: float
    requests: int
    failed: int
    """Refused because the queue was full, or failed; each breaks the SLO."""
    p50_ms: float | None
    """None where no request ended well."""
    p99_ms: float | None
    slo_share: float | None
    """Of all requests, those that ended well within the SLO."""
    throughput_per_s: float
    """Requests that ended well, for each second of the stretch."""
    kv_hit_rate: float | None
    """Of the history tokens, those whose KV was reused."""
    emb_hit_rate: float | None
    """Of the distinct rows that requests needed when first scheduled, those that were resident."""
    emb_fraction: float | None
    """Committed EMB share of the pages, the mean over steps weighted with their time."""


def figures(result: Result) -> Figures:
    """All that came after the warm-up."""
    trace = result.trace
    return _between(result, "all", trace.workload.warm_up_s, trace.seconds)


def figures_by_regime(result: Result) -> list[Figures]:
    """Of each regime, by the time at which requests came; without the warm-up."""
    workload, found = result.trace.workload, []
    begin = workload.warm_up_s
    for regime, end in zip(workload.regimes, workload.ends, strict=True):
        found.append(_between(result, regime.name, begin, end))
        begin = end
    return found


def fraction_over_time(result: Result) -> dict[str, list[float]]:
    """Committed and wanted EMB share of the pages at each change, with seconds after the start."""
    columns, pages = result.steps, result.num_pages
    committed, wanted = columns["emb_pages"], columns["target_emb_pages"]
    changes = np.flatnonzero((np.diff(committed) != 0) | (np.diff(wanted) != 0)) + 1
    places = np.concatenate([[0], changes]) if len(committed) else changes
    places = places[:: 1 + len(places) // _TRACE_POINTS]
    return {
        "seconds": columns["began_s"][places].tolist(),
        "committed": (committed[places] / pages).tolist(),
        "target": (wanted[places] / pages).tolist(),
    }


def as_json(result: Result) -> dict[str, Any]:
    """All figures of a simulation."""
    return {
        **asdict(figures(result)),
        "num_moved_pages": result.num_moved_pages,
        "regimes": [asdict(one) for one in figures_by_regime(result)],
        "fraction_over_time": fraction_over_time(result),
    }


def _between(result: Result, name: str, begin: float, end: float) -> Figures:
    trace = result.trace
    mine = (trace.arrivals >= begin) & (trace.arrivals < end)
    latencies = result.latencies_ms[mine]
    well = ~np.isnan(latencies)
    within = latencies[well] <= trace.setting.slo_ms
    number = len(latencies)
    return Figures(
        name=name,
        seconds=end - begin,
        requests=number,
        failed=number - int(well.sum()),
        p50_ms=_quantile(latencies[well], 0.5),
        p99_ms=_quantile(latencies[well], 0.99),
        slo_share=_share(int(within.sum()), number),
        throughput_per_s=float(well.sum() / (end - begin)),
        kv_hit_rate=_share(
            int(result.cached_tokens[mine].sum()), int(trace.lengths[mine][well].sum())
        ),
        emb_hit_rate=_share(
            int(result.rows_resident[mine].sum()), int(result.rows_requested[mine].sum())
        ),
        emb_fraction=_mean_fraction(result, begin, end),
    )


def _mean_fraction(result: Result, begin: float, end: float) -> float | None:
    columns = result.steps
    mine = (columns["began_s"] >= begin) & (columns["began_s"] < end)
    weights: npt.NDArray[np.float64] = (columns["ended_s"] - columns["began_s"])[mine]
    if not weights.sum():
        return None
    return float(np.average(columns["emb_pages"][mine], weights=weights) / result.num_pages)


def _quantile(values: FloatArray, share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

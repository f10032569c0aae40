"""A plan as a picture: static splits, the split over time, and numbers of engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helm_engine.simulator.planning import ENOUGH_SHARE, Plan
from helm_engine.simulator.recording import Recording

_BINS = 120


def draw_plan(path: Path, plan: Plan, recording: Recording) -> None:
    """Draws a plan; the file's ending says the format.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(10.0, 9.0), layout="constrained")
    figure.suptitle(f"{recording.name}: {len(recording)} requests in {recording.seconds:.0f} s")
    static, engines, over_time, load = figure.subplot_mosaic(
        [["static", "engines"], ["split", "split"], ["load", "load"]],
        height_ratios=[3, 3, 1],
    ).values()
    _draw_static(static, plan)
    _draw_engines(engines, plan)
    for line in plan.lines:
        seconds, shares = np.array(line.split).T
        over_time.step(
            [*seconds, recording.seconds], [*shares, shares[-1]], where="post", label=line.name
        )
    over_time.set_ylabel("EMB share of the pages")
    over_time.set_ylim(0.0, 1.0)
    over_time.axvspan(0.0, plan.warm_up_s, color="#eeeeee", label="warm-up")
    over_time.legend(fontsize=8)
    counts, bounds = np.histogram(recording.arrivals, _BINS, (0.0, recording.seconds))
    load.stairs(counts / np.diff(bounds), bounds, fill=True, color="#7f8c8d")
    load.set_ylabel("requests/s")
    load.set_xlabel("seconds after the first request")
    load.sharex(over_time)
    figure.savefig(path, dpi=130)


def _draw_static(axes: Axes, plan: Plan) -> None:
    shares = list(plan.static)
    p99, device = np.array(list(plan.static.values())).T
    axes.plot(shares, np.where(np.isfinite(p99), p99, np.nan), marker="o", label="P99")
    axes.plot(shares, device, marker="o", label="device, each request")
    axes.axvline(plan.best_share, color="#7f8c8d", linestyle="--", label="best static")
    _logarithmic(axes)
    axes.set_xlabel("EMB share, static")
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)


def _draw_engines(axes: Axes, plan: Plan) -> None:
    numbers = [one.engines for one in plan.engines]
    p99 = [one.p99_ms if np.isfinite(one.p99_ms) else np.nan for one in plan.engines]
    axes.plot(numbers, p99, marker="o", color="#c0392b", label="P99, ms")
    axes.axhline(plan.setting.slo_ms, color="#c0392b", linestyle=":", label="SLO")
    _logarithmic(axes)
    axes.set_xticks(numbers)
    axes.set_xlabel("engines")
    axes.set_ylabel("ms")
    kept = axes.twinx()
    kept.plot(numbers, [one.slo_share for one in plan.engines], marker="s", color="#3b6fb6")
    kept.axhline(ENOUGH_SHARE, color="#3b6fb6", linestyle=":")
    kept.set_ylim(0.0, 1.02)
    kept.set_ylabel("share within the SLO", color="#3b6fb6")
    axes.legend(fontsize=8)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")

"""Latency and goodput over the load, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from helm_engine.bench.report import Figures


def supported_suffixes() -> list[str]:
    """Endings of the files that `write_plot` makes."""
    return [f".{name}" for name in Figure().canvas.get_supported_filetypes()]


def write_plot(path: Path, runs: Sequence[Figures], title: str, deadline_ms: float | None) -> None:
    """Draws percentiles above, goodput below, over the offered rate.

    In the closed loop nothing is offered but what is answered: there the rate is the one reached.

    Args:
        path: its ending says the format.
        runs: at least one.
        title: what was measured.
        deadline_ms: drawn beside the percentiles; None = none.

    Raises:
        OSError: the file cannot be written.
    """
    runs = sorted(runs, key=_load)
    loads = [_load(run) for run in runs]
    figure = Figure(figsize=(7.0, 6.5), layout="constrained")
    figure.suptitle(title)
    latency, goodput = figure.subplots(2, 1, sharex=True)
    for name in ("p50", "p95", "p99"):
        drawn = [getattr(run, f"{name}_ms") for run in runs]
        values = [float("nan") if value is None else value for value in drawn]
        latency.plot(loads, values, marker="o", label=name)
    if deadline_ms is not None:
        latency.axhline(deadline_ms, color="grey", linestyle="--", label="deadline")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter("{x:g}")
    latency.yaxis.set_minor_formatter("{x:g}")
    latency.set_ylabel("latency, ms")
    goodput.plot(loads, loads, color="grey", linestyle=":", label="offered")
    goodput.plot(loads, [run.requests_per_s for run in runs], marker="o", label="answered")
    if deadline_ms is not None:
        within = [run.goodput_per_s for run in runs]
        goodput.plot(loads, within, marker="o", label=f"within {deadline_ms:g} ms")
    goodput.set_ylim(bottom=0.0)
    goodput.set_ylabel("requests/s")
    goodput.set_xlabel("offered load, requests/s")
    for axes in (latency, goodput):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def _load(run: Figures) -> float:
    return run.requests_per_s if run.rate is None else run.rate

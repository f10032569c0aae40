"""Writes the tables of docs/controller-results.md anew from the result file.

A table stands between `<!-- table NAME -->` and `<!-- end -->`.

    python benchmarks/controller_tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

from benchmarks.tables import fill, told

RESULT = REPOSITORY / "benchmarks" / "results" / "controller.json"
PAGE = REPOSITORY / "docs" / "controller-results.md"

Figures = dict[str, Any]


def filled(page: str, figures: Figures) -> str:
    """The page with the tables of these figures; a table without figures says so."""
    return fill(page, {name: table(figures) for name, table in TABLES.items()})


def headline(figures: Figures) -> Iterator[str]:
    """Every controller against both yardsticks."""
    yield (
        "| setting | workload | controller | P99, ms | P99 / best static | share of the schedule's "
        "gain | within the SLO | throughput / best static | fraction gap | regret, ms |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for one in figures.get("headline", {}).get("cells", []):
        yield (
            f"| `{one['setting']}` | `{one['workload']}` | `{one['controller']}` | "
            f"{told(one['p99_ms'], 0)} | {told(one['p99_vs_best_static'])} | "
            f"{told(one['share_of_schedules_gain'])} | {told(one['slo'], 3)} | "
            f"{told(one['throughput_vs_best_static'], 3)} | {told(one['fraction_gap'], 3)} | "
            f"{told(one['regret_ms'], 1)} |"
        )


def overall(figures: Figures) -> Iterator[str]:
    """Geometric means over all workloads and settings."""
    yield "| controller | P99 / best static, geometric mean |"
    yield "|---|---|"
    for name, found in figures.get("headline", {}).get("p99_vs_best_static_all", {}).items():
        yield f"| `{name}` | {told(found)} |"


def _section(name: str, beside: str | None = None) -> Any:
    def rows(figures: Figures) -> Iterator[str]:
        extra = "" if beside is None else f" {beside} |"
        yield f"| setting | workload | controller |{extra} P99 / best static | SLO | fraction gap |"
        yield "|---" * (6 if beside is None else 7) + "|"
        for one in figures.get("summary", {}).get(name, []):
            other = "" if beside is None else f" {one[beside]} |"
            yield (
                f"| `{one['setting']}` | `{one['workload']}` | `{one['controller']}` |{other} "
                f"{told(one['p99_vs_best_static'])} | {told(one['slo'], 3)} | "
                f"{told(one['fraction_gap'], 3)} |"
            )

    return rows


def costs(figures: Figures) -> Iterator[str]:
    """What a decision costs, and how fast the simulation is."""
    yield "| | p50 | p99 |"
    yield "|---|---|---|"
    for name, what in (("decision_us", "a decision, µs"), ("integrate_us", "between two, µs")):
        if figures.get(name, {}).get("p99") is not None:
            yield f"| {what} | {figures[name]['p50']:.1f} | {figures[name]['p99']:.1f} |"


TABLES = {
    "headline": headline,
    "overall": overall,
    "baselines": _section("baselines"),
    "ablations": _section("ablations"),
    "random_weights": _section("random_weights"),
    "slew_sweep": _section("slew_sweep", "slew_per_s"),
    "held_out": _section("held_out", "profile"),
    "costs": costs,
}


def main() -> None:
    """Rewrites the page."""
    figures = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()

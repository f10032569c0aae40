"""Writes the tables of docs/cluster.md anew from the result file.

A table stands between `<!-- table NAME -->` and `<!-- end -->`.

    python benchmarks/cluster_tables.py
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

RESULT = REPOSITORY / "benchmarks" / "results" / "cluster.json"
PAGE = REPOSITORY / "docs" / "cluster.md"

Figures = dict[str, Any]
_FIGURES = (("p50_ms", 0), ("p99_ms", 0), ("slo", 3), ("kv_hit", 3), ("emb_hit", 3))


def filled(page: str, figures: Figures) -> str:
    """The page with the tables of these figures; a table without figures says so."""
    return fill(page, {name: table(figures) for name, table in TABLES.items()})


def _row(one: Figures, *first: str) -> str:
    parts = [*first, *(told(one[name], digits) for name, digits in _FIGURES)]
    return "| " + " | ".join(parts)


def policies(figures: Figures) -> Iterator[str]:
    """Every policy, at each scale that was run."""
    yield (
        "| k | workload | policy | P50, ms | P99, ms | within the SLO | KV hits | EMB hits | "
        "busiest / mean | P99 / joint |"
    )
    yield "|---" * 10 + "|"
    for one in figures.get("summary", {}).get("policies", []):
        row = _row(one, str(one["k"]), f"`{one['workload']}`", f"`{one['policy']}`")
        yield f"{row} | {told(one['load_spread'])} | {told(one['p99_vs_joint'])} |"


def _sweep(section: str, axis: str, heading: str) -> Any:
    def rows(figures: Figures) -> Iterator[str]:
        yield (
            f"| workload | policy | {heading} | P50, ms | P99, ms | within the SLO | KV hits | "
            "EMB hits | P99 / that of 1 router, 0.1 s |"
        )
        yield "|---" * 9 + "|"
        for one in figures.get("summary", {}).get(section, []):
            row = _row(one, f"`{one['workload']}`", f"`{one['policy']}`", f"{one[axis]:g}")
            yield f"{row} | {told(one['p99_vs_usual'])} |"

    return rows


def paper(figures: Figures) -> Iterator[str]:
    """Static and least loaded against controlled and routed by residency."""
    yield (
        "| workload | split | policy | P50, ms | P99, ms | within the SLO | KV hits | EMB hits | "
        "P99 / best static, least_load |"
    )
    yield "|---" * 9 + "|"
    for one in figures.get("summary", {}).get("paper", []):
        row = _row(one, f"`{one['workload']}`", one["split"], f"`{one['policy']}`")
        yield f"{row} | {told(one['p99_vs_best_static_least_load'])} |"


def costs(figures: Figures) -> Iterator[str]:
    """What a decision costs, and how fast the simulation is."""
    yield "| | p50 | p99 |"
    yield "|---|---|---|"
    for name, what in (
        ("decision_us", "a decision, µs"),
        ("decision_with_hash_us", "with the hashes of the history, µs"),
    ):
        if figures.get(name):
            yield f"| {what} | {figures[name]['p50']:.0f} | {figures[name]['p99']:.0f} |"


TABLES = {
    "policies": policies,
    "staleness": _sweep("staleness", "staleness_s", "staleness, s"),
    "routers": _sweep("routers", "routers", "routers"),
    "paper": paper,
    "costs": costs,
}


def main() -> None:
    """Rewrites the page."""
    figures = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()

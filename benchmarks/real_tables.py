"""Writes the tables of `real_burst`, `free_running` and `decision_cost` in docs/benchmarks.md anew.

python benchmarks/real_tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

from benchmarks.tables import fill

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "benchmarks.md"

Figures = dict[str, Any]


def filled(page: str) -> str:
    """The page with the tables of the result files that are there."""
    return fill(page, {name: table(_figures(file)) for name, (file, table) in TABLES.items()})


def _figures(name: str) -> Figures:
    path = RESULTS / f"{name}.json"
    found: Figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _with_interval(found: Figures) -> str:
    low, high = found["interval"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def real_burst(figures: Figures) -> Iterator[str]:
    """A line for each arm."""
    yield (
        "| arm | P99 / best static | P99, ms | P50, ms | within the SLO | tokens reused | rows "
        "resident | EMB share | P99 simulated, ms |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in figures.get("cells", []):
        ratio = figures["p99_over_best_static"].get(one["arm"])
        told = one["simulated"]["p99_ms"]
        yield (
            f"| `{one['arm']}` | {_with_interval(ratio) if ratio else ''} | {one['p99_ms']:.0f} | "
            f"{one['p50_ms']:.0f} | {one['slo_share']:.3f} | {_percent(one['kv_hit_share'])} | "
            f"{_percent(one['row_hit_share'])} | {one['emb_fraction']:.2f} | "
            f"{min(told):.0f} to {max(told):.0f} |"
        )


def real_burst_cpu(figures: Figures) -> Iterator[str]:
    """Processors of each arm: by process in shares of one, in the end of all."""
    roles = ("front", "core", "redis", "link", "client")
    yield f"| arm | {' | '.join(roles)} | these together, of all processors | machine |"
    yield "|---" * (len(roles) + 3) + "|"
    for one in figures.get("cells", []):
        shares = one["cpu_shares"]
        own = " | ".join(_percent(shares[role]) for role in roles)
        both = f"{_percent(shares['ours'])} | {_percent(shares['machine'])}"
        yield f"| `{one['arm']}` | {own} | {both} |"


def real_burst_runs(figures: Figures) -> Iterator[str]:
    """What there was of it."""
    yield "| runs | void | requests failed | largest difference of a score | busiest run |"
    yield "|---|---|---|---|---|"
    if figures:
        yield (
            f"| {figures['runs']} | {figures['void_runs']} | {figures['failed_requests']} | "
            f"{figures['max_score_diff']:.1e} | {_percent(figures['most_busy'])} |"
        )


def free_running(figures: Figures) -> Iterator[str]:
    """A line for each cell and seed."""
    yield (
        "| cell | seed | KV hits, points | EMB hits, points | P50, simulated / real | P99, "
        "simulated / real | spread of the real P99 | void runs | within the bounds |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in figures.get("cells", []):
        points = [f"{one['hit_points'][name]:+.2f}" for name in ("kv_hit_rate", "emb_hit_rate")]
        missed = [name for name, is_within in one["within_bounds"].items() if not is_within]
        yield (
            f"| {one['cell']} | {one['seed']} | {' | '.join(points)} | {one['p50_ratio']:.2f} | "
            f"{one['p99_ratio']:.2f} | {_percent(one['p99_spread'])} | "
            f"{sum(run['void'] for run in one['real'])} of {len(one['real'])} | "
            f"{'yes' if not missed else 'not ' + ', '.join(missed)} |"
        )


def decision_cost(figures: Figures) -> Iterator[str]:
    """A line for each controller; of several seeds the largest."""
    yield (
        "| engine | controller | a decision, µs: p50 | p99 | between two: p50 | p99 | all: p50 | "
        "p99 | an ended request: p50 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    by_cell: dict[tuple[str, str], list[Figures]] = {}
    for one in figures.get("cells", []):
        by_cell.setdefault((one["executor"], one["controller"]), []).append(one)
    columns = [
        (kind, share)
        for kind in ("decision_us", "integrate_us", "all_us")
        for share in ("p50", "p99")
    ]
    for (executor, controller), lines in by_cell.items():
        told = [
            _largest(lines, kind, share) for kind, share in (*columns, ("ended_request_us", "p50"))
        ]
        yield f"| {executor} | `{controller}` | {' | '.join(told)} |"


def _largest(lines: list[Figures], kind: str, share: str) -> str:
    values = [one[kind][share] for one in lines if share in one[kind]]
    return f"{max(values):.1f}" if values else ""


TABLES = {
    "real_burst": ("real_burst", real_burst),
    "real_burst_cpu": ("real_burst", real_burst_cpu),
    "real_burst_runs": ("real_burst", real_burst_runs),
    "free_running": ("free_running", free_running),
    "decision_cost": ("decision_cost", decision_cost),
}
"""By name: the result file, and what makes lines of it."""


def main() -> None:
    """Rewrites the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

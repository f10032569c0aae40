"""Figures of a run, as a table and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from helm_engine.bench.load import Outcome

LATE_MS = 5.0
"""A client that sends its requests later than this at p99 could not keep up with its own rate."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One load and what the server made of it; latencies are those of status 200."""

    rate: float | None
    """Offered, requests/s; None in the closed loop."""
    concurrency: int | None
    """Requests in flight in the closed loop."""
    seconds: float
    """From the start to the last answer."""
    sent: int
    ok: int
    """Answers with status 200."""
    errors: dict[str, int]
    """The others by status, `timeout` or `connection`."""
    first_error: str
    """What the server said of the first of them."""
    requests_per_s: float
    """Answers with status 200."""
    goodput_per_s: float
    """Those of them within the deadline; all of them where there is none."""
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    cached_token_share: float | None
    """Of the history tokens, those whose K and V were reused."""
    row_hit_share: float | None
    """Of the distinct embedding rows, those that were in the pool."""
    client_late_p99_ms: float
    """How much later than intended the client sent; contained in the latencies."""

    @property
    def load(self) -> str:
        """The load in words."""
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency} at once"


def figures_of(
    outcomes: Sequence[Outcome],
    *,
    rate: float | None,
    concurrency: int | None,
    deadline_ms: float | None,
    started: float,
) -> Figures:
    """Sums up one load.

    Args:
        outcomes: of all requests, at least one.
        rate: offered in the open loop, requests/s.
        concurrency: in the closed loop.
        deadline_ms: of each request, counted from when it was due; None = none.
        started: when the load began, as `Outcome` tells time.
    """
    answered = [one for one in outcomes if one.status == "200"]
    failed = [one for one in outcomes if one.status != "200"]
    latencies_ms = np.array([(one.ended - one.due) * 1e3 for one in answered])
    in_time = len(answered)
    if deadline_ms is not None:
        in_time = int((latencies_ms <= deadline_ms).sum())
    seconds = max(one.ended for one in outcomes) - started
    p50, p95, p99 = (_quantile(latencies_ms, share) for share in (0.5, 0.95, 0.99))
    late_ms = np.array([(one.sent - one.due) * 1e3 for one in outcomes])
    return Figures(
        rate=rate,
        concurrency=concurrency,
        seconds=seconds,
        sent=len(outcomes),
        ok=len(answered),
        errors=dict(Counter(one.status for one in failed)),
        first_error=next((one.message for one in failed if one.message), ""),
        requests_per_s=len(answered) / seconds,
        goodput_per_s=in_time / seconds,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        cached_token_share=_share(
            sum(one.cached_tokens for one in answered),
            sum(one.history_tokens for one in answered),
        ),
        row_hit_share=_share(
            sum(one.rows_resident for one in answered),
            sum(one.rows_requested for one in answered),
        ),
        client_late_p99_ms=float(np.quantile(late_ms, 0.99)),
    )


def _quantile(values: np.ndarray[Any, Any], share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def table_of(runs: Sequence[Figures], deadline_ms: float | None) -> Table:
    """A row for each load; goodput only where there is a deadline."""
    headings = ["load", "sent", "ok", "errors", "req/s", "goodput"]
    headings += ["p50 ms", "p95 ms", "p99 ms", "cached", "rows"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for heading in headings:
        if heading != "goodput" or deadline_ms is not None:
            table.add_column(heading, justify="left" if heading == "errors" else "right")
    for run in runs:
        cells = [run.load, str(run.sent), str(run.ok)]
        cells.append(", ".join(f"{number} × {name}" for name, number in run.errors.items()) or "-")
        cells.append(f"{run.requests_per_s:.1f}")
        if deadline_ms is not None:
            cells.append(f"{run.goodput_per_s:.1f}")
        for value in (run.p50_ms, run.p95_ms, run.p99_ms):
            cells.append("-" if value is None else f"{value:.1f}")
        for share in (run.cached_token_share, run.row_hit_share):
            cells.append("-" if share is None else f"{share:.0%}")
        table.add_row(*cells)
    return table


def remarks_of(runs: Sequence[Figures]) -> list[str]:
    """What a reader of the table should know."""
    remarks = [f"{run.load}: {run.first_error}" for run in runs if run.first_error]
    remarks += [
        f"{run.load}: the client sent up to {run.client_late_p99_ms:.1f} ms late (p99), which its "
        "latencies contain; give it a core of its own"
        for run in runs
        if run.client_late_p99_ms > LATE_MS
    ]
    return remarks


def write_json(path: Path, about: dict[str, Any], runs: Sequence[Figures]) -> None:
    """Writes the figures with what they were taken from.

    Raises:
        OSError: the file cannot be written.
    """
    result = {**about, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

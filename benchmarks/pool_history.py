"""The pool over time: who owns the pages, what is found in it, what moves; as a picture too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from helm_engine.scheduler import Scheduler

_COLUMNS = (
    "seconds", "target", "committed", "kv_held", "rows_resident",
    "prefix_queries", "prefix_hits", "row_queries", "row_hits", "pages_moved",
)  # fmt: skip
_SMOOTHED_S = 0.5
"""Hit shares are drawn over windows of this length."""


class PoolHistory:
    """Samples of one engine's pool."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, ...]] = []

    def note(self, scheduler: Scheduler, seconds: float) -> None:
        """Adds a sample."""
        stats, boundary = scheduler.stats, scheduler.boundary
        num_pages = scheduler.pool.num_pages
        self._samples.append(
            (
                seconds,
                boundary.target,
                boundary.committed,
                scheduler.kv.pool.num_held_blocks / num_pages,
                boundary.committed * scheduler.emb.usage,
                stats.prefix_queries,
                stats.prefix_hits,
                stats.row_queries,
                stats.row_hits,
                boundary.num_moved_pages,
            )
        )

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """One quantity over all samples."""
        return np.array(self._samples)[:, _COLUMNS.index(name)]

    def _share(self, hits: str, queries: str) -> float:
        asked, found = self.column(queries), self.column(hits)
        return float((found[-1] - found[0]) / max(1.0, asked[-1] - asked[0]))

    @property
    def row_hit_share(self) -> float:
        """Share of the rows asked for, from the first sample to the last, that were resident."""
        return self._share("row_hits", "row_queries")

    @property
    def cached_token_share(self) -> float:
        """Share of the context tokens, likewise, whose KV was reused."""
        return self._share("prefix_hits", "prefix_queries")

    def windowed(self, hits: str, queries: str) -> npt.NDArray[np.float64]:
        """The share of hits in the window that ends at each sample; NaN without queries."""
        times = self.column("seconds")
        first = np.searchsorted(times, times - _SMOOTHED_S)
        asked, found = self.column(queries), self.column(hits)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((found - found[first]) / (asked - asked[first]))


def draw(path: Path, histories: Mapping[str, PoolHistory]) -> None:
    """Draws each engine's pool in a column of three panels, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, len(histories), figsize=(3.4 * len(histories), 7.5), sharex=True, sharey="row",
        squeeze=False,
    )  # fmt: skip
    for place, (name, history) in enumerate(histories.items()):
        owners, hits, moves = axes[:, place]
        seconds = history.column("seconds")
        committed, held = history.column("committed"), history.column("kv_held")
        resident = history.column("rows_resident")
        owners.stackplot(
            seconds, resident, committed - resident, 1.0 - committed - held, held,
            labels=["EMB: rows", "EMB: unfilled", "KV: free or reusable", "KV: in use"],
            colors=["#3b6fb6", "#b9cfe9", "#f2d3a8", "#d98324"],
        )  # fmt: skip
        owners.plot(seconds, history.column("target"), "k--", linewidth=1, label="target")
        owners.set_title(name)
        hits.plot(seconds, history.windowed("row_hits", "row_queries"), "#3b6fb6", label="rows")
        hits.plot(seconds, history.windowed("prefix_hits", "prefix_queries"), "#d98324", label="KV")
        moved = history.column("pages_moved")
        moves.plot(seconds, moved - moved[0], "k")
        moves.set_xlabel("seconds")
    for row, label in enumerate(("share of the pool's pages", "hit share", "pages moved")):
        axes[row][0].set_ylabel(label)
    axes[0][0].set_ylim(0, 1)
    axes[1][0].set_ylim(0, 1)
    axes[0][-1].legend(fontsize=7, loc="upper right")
    axes[1][-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

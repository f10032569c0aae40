"""Pictures of the cluster benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]

COLOURS = {
    "joint": "#c0392b",
    "kv": "#3b6fb6",
    "emb": "#27ae60",
    "least_load": "#7f8c8d",
    "consistent_hash": "#d98324",
    "round_robin": "#000000",
}
WORKLOADS = ("steady", "trend", "burst")


def draw_policies(path: Path, policies: list[Record]) -> None:
    """P99 of every policy on every workload, with 95 % intervals; at the smallest scale run."""
    pyplot = _pyplot()
    scale = min(one["k"] for one in policies)
    mine = {(one["workload"], one["policy"]): one for one in policies if one["k"] == scale}
    workloads = [name for name in WORKLOADS if (name, "joint") in mine]
    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(COLOURS)
    for shift, (policy, colour) in enumerate(COLOURS.items()):
        told = [mine[workload, policy]["p99_ms"] for workload in workloads]
        at = [place + (shift - (len(COLOURS) - 1) / 2) * width for place in range(len(told))]
        reach = [one["interval"][1] - one["mean"] if one["interval"] else 0.0 for one in told]
        means = [one["mean"] for one in told]
        axes.bar(at, means, width, yerr=reach, capsize=2, color=colour, label=policy)
    axes.set_yscale("log")
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("P99, ms")
    axes.set_title(f"k = {scale}")
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)


def draw_sweeps(path: Path, summary: Record) -> None:
    """P99 of `joint` by staleness and by routers, over that of one router and 0.1 s."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, section, axis in (
        (left, "staleness", "staleness_s"),
        (right, "routers", "routers"),
    ):
        for workload in WORKLOADS:
            mine = [
                one
                for one in summary[section]
                if one["workload"] == workload and one["policy"] == "joint"
            ]
            ratios = [one["p99_vs_usual"]["mean"] for one in mine]
            axes.plot([one[axis] for one in mine], ratios, marker="o", label=workload)
        axes.axhline(1.0, color="#7f8c8d", linestyle="--")
    left.set_xscale("symlog", linthresh=0.1)
    left.set_xlabel("staleness, s")
    left.set_ylabel("P99 of joint / that with 1 router and 0.1 s")
    right.set_xlabel("routers")
    left.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

"""Pictures of the controller benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "helm": "#c0392b",
    "best_static": "#7f8c8d",
    "best_schedule": "#27ae60",
    "marginal": "#3b6fb6",
    "hill_climb": "#d98324",
    "oracle": "#000000",
}


def draw_p99(path: Path, headline: dict[str, Any]) -> None:
    """P99 over that of the best static share, by workload and setting, with 95 % intervals."""
    pyplot = _pyplot()
    cells = headline["cells"]
    places = list(dict.fromkeys((one["setting"], one["workload"]) for one in cells))
    names = [
        name
        for name in COLOURS
        if name != "best_static" and any(one["controller"] == name for one in cells)
    ]
    figure, axes = pyplot.subplots(figsize=(10, 4))
    width = 0.8 / len(names)
    for shift, name in enumerate(names):
        mine = {
            (one["setting"], one["workload"]): one["p99_vs_best_static"]
            for one in cells
            if one["controller"] == name
        }
        at = [place + (shift - (len(names) - 1) / 2) * width for place in range(len(places))]
        means = [mine[place]["mean"] for place in places]
        reach = [
            (one["interval"][1] - one["mean"]) if one["interval"] else 0.0
            for one in (mine[place] for place in places)
        ]
        axes.bar(at, means, width, yerr=reach, capsize=2, color=COLOURS[name], label=name)
    axes.axhline(1.0, color=COLOURS["best_static"], linestyle="--", label="best_static")
    axes.set_yscale("log")
    axes.set_yticks([0.5, 0.7, 1.0, 1.5, 2.0, 4.0], ["0.5", "0.7", "1", "1.5", "2", "4"])
    axes.minorticks_off()
    axes.set_xticks(range(len(places)), [f"{workload}\n{setting}" for setting, workload in places])
    axes.set_ylabel("P99 / best static")
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_trace(path: Path, traces: list[dict[str, Any]], setting: str = "dlrmv3") -> None:
    """The committed split over time, a panel for each workload of a setting."""
    pyplot = _pyplot()
    mine = [one for one in traces if one["setting"] == setting]
    mine = [one for one in mine if one["seed"] == mine[0]["seed"]]
    figure, panels = pyplot.subplots(len(mine), 1, figsize=(10, 3.2 * len(mine)), squeeze=False)
    for axes, trace in zip(panels[:, 0], mine, strict=True):
        for name in ("oracle", "best_static", "best_schedule", "marginal", "helm"):
            if name in trace["emb_fraction"]:
                is_oracle = name == "oracle"
                axes.plot(
                    trace["seconds"],
                    trace["emb_fraction"][name],
                    color=COLOURS[name],
                    linewidth=0.8 if is_oracle else 1.5,
                    linestyle=":" if is_oracle else "-",
                    label=name,
                )
        for end in trace["regime_ends"][:-1]:
            axes.axvline(end, color="#dddddd", zorder=0)
        axes.set_title(f"{trace['workload']}, {trace['setting']}")
        axes.set_ylabel("EMB share of the pages")
        axes.set_ylim(0, 1)
    panels[0, 0].legend(fontsize=8, loc="upper right")
    panels[-1, 0].set_xlabel("seconds after the warm-up")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

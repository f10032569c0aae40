r"""Every controller on every workload and setting, against what would have been best.

`best_static` and `best_schedule` are known only afterwards: the best static share of EMB, and the
best schedule that a search found under the controllers' slew limit. All start from the same split.
Headline cells are run at k = 1, all others at k = 16. Time is virtual, so figures do not depend on
the machine; what a decision costs and how fast the simulation is do.

    python benchmarks/controller.py --json benchmarks/results/controller.json --seeds 1,2,3

A part of it alone, merged into what the file has already:

    python benchmarks/controller.py --json benchmarks/results/controller.json --seeds 1,2,3 \
        --settings dlrmv3 --part headline,baselines

After another policy, its runs alone (yardsticks and other controllers do not depend on it):

    python benchmarks/controller.py --json benchmarks/results/controller.json --seeds 1,2,3 \
        --part headline,baselines --controllers helm
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # The processes share the machine's cores among themselves.
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

from benchmarks.controller_cases import HELD_OUT, SETTINGS, WORKLOADS
from benchmarks.controller_parts import Found, Task, registered, run_task
from benchmarks.controller_plots import draw_p99, draw_trace
from benchmarks.controller_summary import against_static, headline
from benchmarks.decision_cost import CONFIG, QUICK_RUNNING_S, RUNNING_S, measure_running
from benchmarks.parts_file import add_records, add_speeds, read_earlier
from benchmarks.report import benchmark_parser, write_result
from benchmarks.side_by_side import run_side_by_side
from helm_engine.controller.registry import make_controller

PARTS = ("headline", "baselines", "ablations", "held_out", "decision")
ABLATED = ("dlrmv3",)
"""Settings in which `helm` is taken apart."""
QUICK_SETTINGS = ("dlrmv3",)
QUICK_ABLATED = "burst"
QUICK_HELD_OUT = ("two bursts",)
IDENTITY = ("workload", "setting", "profile", "k", "controller", "slew_per_s", "seed")
"""What tells runs apart."""
COSTLY = ("production", "ml100k", "dlrmv3", "held_out")
"""Settings, the longest tasks first."""


def tasks(
    parts: tuple[str, ...],
    settings: tuple[str, ...],
    workloads: tuple[str, ...],
    seeds: list[int],
    quick: bool,
    controllers: tuple[str, ...] = (),
) -> list[Task]:
    """What there is to do, the longest first."""
    found = []
    for seed in seeds:
        for setting, workload in product(settings, workloads):
            taken_apart = setting in ABLATED and (not quick or workload == QUICK_ABLATED)
            mine = tuple(
                part
                for part in parts
                if part in ("headline", "baselines") or (part == "ablations" and taken_apart)
            )
            if mine:
                first = seed == seeds[0]
                found.append(Task(setting, workload, seed, mine, quick, first, controllers))
        if "held_out" in parts:
            names = QUICK_HELD_OUT if quick else tuple(HELD_OUT)
            found += [Task("held_out", name, seed, ("held_out",), quick, False) for name in names]
    return sorted(found, key=lambda one: (COSTLY.index(one.setting), one.workload == "steady"))


def decision_figures(seed: int, quick: bool) -> dict[str, Any]:
    """What a decision costs, measured as `benchmarks/decision_cost.py` does.

    None where a busy machine did not come to one in the time given.
    """
    (name,) = registered("helm") or registered("marginal")
    seconds = QUICK_RUNNING_S if quick else RUNNING_S
    measured = measure_running(seconds, make_controller(name, CONFIG), seed)
    return {
        "decision_controller": name,
        **{
            kind: {which: measured[kind].get(which) for which in ("p50", "p99")}
            for kind in ("decision_us", "integrate_us")
        },
    }


def add_found(figures: dict[str, Any], found: Found) -> None:
    """Adds what a task found."""
    for section, records in found.sections.items():
        add_records(figures, section, records, IDENTITY)
    add_speeds(figures, found.requests_per_s)


def summaries(figures: dict[str, Any]) -> None:
    """Works out anew what follows from the records."""
    cells = figures["cells"]
    scales = [one["k"] for one in cells if one["controller"] == "best_schedule"]
    if scales:
        figures["headline"] = headline(cells, min(scales))
    told = {}
    for section in ("ablations", "random_weights", "slew_sweep", "held_out"):
        if figures.get(section):
            beside = "slew_per_s" if section == "slew_sweep" else "profile"
            told[section] = against_static(figures[section], beside)
    baselines = [one for one in cells if one["k"] != min(scales, default=0)]
    if baselines:
        told["baselines"] = against_static(baselines, "profile")
    figures["summary"] = told


def plots(figures: dict[str, Any], directory: Path) -> None:
    """Draws both pictures."""
    if "headline" in figures:
        draw_p99(directory / "controller_p99.png", figures["headline"])
    traces = [one for one in figures.get("traces", []) if one["workload"] != "steady"]
    if traces:
        draw_trace(directory / "controller_trace.png", traces)


def _write(path: Path, figures: dict[str, Any], seeds: list[int]) -> None:
    write_result(path, figures, sorted({*seeds, *(one["seed"] for one in figures["cells"])}))


def _command() -> str:
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def main() -> None:
    """Runs the parts that are asked for and merges them into the file."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--settings", help=f"of {', '.join(SETTINGS)}; default: all")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--controllers", help="only these in headline and baselines; default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plots", type=Path, help="directory where the pictures go")
    arguments = parser.parse_args()
    quick, seeds = arguments.quick, arguments.seeds
    parts = tuple(arguments.part.split(","))
    settings = QUICK_SETTINGS if quick else SETTINGS
    if arguments.settings:
        settings = tuple(arguments.settings.split(","))
    workloads = tuple(arguments.workloads.split(","))
    controllers = tuple(arguments.controllers.split(",")) if arguments.controllers else ()
    for names, allowed in (
        (parts, PARTS),
        (settings, SETTINGS),
        (workloads, WORKLOADS),
        (controllers, registered()),
    ):
        if unknown := set(names) - set(allowed):
            parser.error(f"{', '.join(unknown)}: none of {', '.join(allowed)}")
    figures = read_earlier(arguments.json)
    figures["commands"] = [*figures["commands"], _command()]
    if "decision" in parts:  # Before the others make the machine busy.
        figures |= decision_figures(seeds[0], quick)
    todo = tasks(parts, settings, workloads, seeds, quick, controllers)
    for _, found in run_side_by_side(run_task, todo, arguments.processes):
        add_found(figures, found)
        summaries(figures)
        _write(arguments.json, figures, seeds)
    summaries(figures)
    _write(arguments.json, figures, seeds)
    if arguments.plots:
        plots(figures, arguments.plots)


if __name__ == "__main__":
    main()

r"""Routing policies over 32 engines in virtual time, with a controller live on each engine.

Engines begin at different splits of their pools (EMB shares of 0.1 to 0.9). Every policy sees the
same requests of the same seeds. Time is virtual, so figures do not depend on the machine; what a
decision costs and how fast the simulation is do.

All parts at k = 16, and the policies at k = 1; the second run adds to the file of the first:

    python benchmarks/cluster.py --json benchmarks/results/cluster.json --seeds 1,2,3 --plots docs
    python benchmarks/cluster.py --json benchmarks/results/cluster.json --seeds 1,2,3 --plots docs \
        --scale 1 --part policies

`cells` has every policy with one router that learns of engines 0.1 s late. `staleness` and
`routers` have what differs from it, `static` and `best_static` the other side of the paper's
comparison; `engines` says of each run what became of its engines, and `summary` has means over
seeds.
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

from benchmarks import router_decision
from benchmarks.cluster_plots import draw_policies, draw_sweeps
from benchmarks.cluster_runs import PACE, PARTS, WARM_UP_S, Found, Task, run_task
from benchmarks.cluster_summary import along, by_policy, papers_table
from benchmarks.parts_file import add_records, add_speeds, read_earlier
from benchmarks.report import benchmark_parser, write_result
from benchmarks.side_by_side import run_side_by_side

WORKLOADS = ("burst", "trend", "steady")
"""The longest first."""
ENGINES = 32
SCALE = 16
QUICK_ENGINES = 8
QUICK_PACE = 20.0
QUICK_WARM_UP_S = 5.0
QUICK_WORKLOADS = ("trend",)
ONE_SEED = ("staleness", "routers")
"""Parts that are run with the first seed only."""
DECISION = "decision"
IDENTITY = ("workload", "policy", "seed", "k", "engines", "routers", "staleness_s")
"""What tells runs apart."""


def tasks(
    parts: tuple[str, ...],
    workloads: tuple[str, ...],
    seeds: list[int],
    scale: int,
    quick: bool,
) -> list[Task]:
    """What there is to do, the longest first."""
    size = (QUICK_ENGINES, scale, QUICK_PACE, QUICK_WARM_UP_S)
    if not quick:
        size = (ENGINES, scale, PACE, WARM_UP_S)
    wanted = [part for part in PARTS if part in parts]
    return [
        Task(part, workload, seed, *size, quick)
        for part, workload, seed in product(wanted, workloads, seeds)
        if part not in ONE_SEED or seed == seeds[0]
    ]


def add_found(figures: dict[str, Any], task: Task, found: Found) -> None:
    """Adds what a task found."""
    for section, records in found.sections.items():
        add_records(figures, section, records, IDENTITY)
    add_speeds(figures, {task.scale: found.requests_per_s})
    figures["pace"] = task.pace


def summarize(figures: dict[str, Any]) -> None:
    """Works out anew what follows from the records."""
    cells = figures["cells"]
    told: dict[str, Any] = {"policies": by_policy(cells)}
    for axis, section in (("staleness_s", "staleness"), ("routers", "routers")):
        if figures.get(section):
            told[section] = along(figures[section], cells, axis)
    if figures.get("static"):
        told["paper"] = papers_table(cells, figures["static"])
    figures["summary"] = told


def plots(figures: dict[str, Any], directory: Path) -> None:
    """Draws both pictures."""
    draw_policies(directory / "cluster_p99.png", figures["summary"]["policies"])
    if {"staleness", "routers"} <= set(figures["summary"]):
        draw_sweeps(directory / "cluster_sweeps.png", figures["summary"])


def _command() -> str:
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def main() -> None:
    """Runs the parts that are asked for and merges them into the file."""
    all_parts = (DECISION, *PARTS)
    parser = benchmark_parser(__doc__)
    parser.add_argument("--part", default=",".join(all_parts), help=f"of {', '.join(all_parts)}")
    parser.add_argument("--workloads", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--scale", type=int, default=SCALE, metavar="K")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plots", type=Path, help="directory where the pictures go")
    arguments = parser.parse_args()
    quick, seeds = arguments.quick, arguments.seeds
    parts = tuple(arguments.part.split(","))
    workloads = QUICK_WORKLOADS if quick else WORKLOADS
    if arguments.workloads:
        workloads = tuple(arguments.workloads.split(","))
    for names, allowed in ((parts, all_parts), (workloads, WORKLOADS)):
        if unknown := set(names) - set(allowed):
            parser.error(f"{', '.join(unknown)}: none of {', '.join(allowed)}")
    figures = read_earlier(arguments.json)
    figures["commands"] = [*figures["commands"], _command()]
    if DECISION in parts:  # Before the others make the machine busy.
        figures |= router_decision.measure(seeds[0], quick)
    todo = tasks(parts, workloads, seeds, arguments.scale, quick)
    for task, found in run_side_by_side(run_task, todo, arguments.processes):
        add_found(figures, task, found)
        summarize(figures)
        all_seeds = sorted({*seeds, *(one["seed"] for one in figures["cells"])})
        write_result(arguments.json, figures, all_seeds)
    summarize(figures)
    write_result(arguments.json, figures, seeds)
    if arguments.plots:
        plots(figures, arguments.plots)


if __name__ == "__main__":
    main()

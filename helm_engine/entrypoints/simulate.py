"""`helm-engine simulate`: a workload, or recorded requests, through the engine in virtual time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from helm_engine.entrypoints.cluster_options import ClusterOptions
from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.option_groups import takes_option_groups
from helm_engine.entrypoints.waiting import SlowNotice

if TYPE_CHECKING:
    from helm_engine.simulator.figures import Figures
    from helm_engine.simulator.simulation import EngineModel, FloatArray
    from helm_engine.simulator.trace import Trace

EXAMPLES = """
\b
Examples:
  helm-engine simulate --workload trend --emb-fraction 0.3
  helm-engine simulate --workload burst --emb-fraction 0.25 --at 120:0.45 --at 165:0.25
  helm-engine simulate --workload trend --setting production --emb-fraction 0.3
  helm-engine simulate --workload trend --emb-fraction 0.3 --controller hill_climb
  helm-engine simulate --workload mine.json --emb-fraction 0.3 --seed 7 --json out.json
  helm-engine simulate --workload trend --emb-fraction 0.3 --scale 16
  helm-engine simulate --trace recorded.trace --emb-fraction 0.3
  helm-engine simulate --workload trend --emb-fraction 0.5 --engines 8 --routing-policy joint

\b
docs/simulator.md has the schema of a workload, and says what is simulated.
"""
_JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")
]
_Scale = Annotated[
    int,
    typer.Option(
        metavar="K",
        help="Pages and rows that one stands for, a power of two up to 64: cheaper, less exact.",
    ),
]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What is run: a workload, drawn, or requests that were recorded."""

    workload: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="steady, trend, burst, or a .json file."),
    ] = None
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="What `serve --record-trace` wrote, instead of a workload.",
        ),
    ] = None
    setting: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="dlrmv3, ml100k, production, or a .json file, instead of the workload's own.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0

    def check(self) -> None:
        """Looks before anything is loaded.

        Raises:
            CommandError: names the flag.
        """
        if (self.workload is None) == (self.trace_file is None):
            raise CommandError("--workload: says what is run, or --trace does; give one of them")
        if self.trace_file is not None and self.setting is not None:
            raise CommandError("--setting: is that of a workload; a trace brings its own")
        if self.trace_file is not None and self.seed:
            raise CommandError("--seed: draws a workload; nothing is drawn for a trace")

    def made(self, profile: str | None, scale: int, engines: int = 1) -> tuple[Trace, EngineModel]:
        """The requests, and the engine that they are for.

        Args:
            profile: name or file of the device's costs, instead of the setting's own.
            scale: of the engine.
            engines: a workload is made so many times larger; recorded requests are as they are.

        Raises:
            ValueError: names the file or the field.
        """
        from helm_engine.simulator.cluster_workload import cluster_workload
        from helm_engine.simulator.recording import device_of, read_recording
        from helm_engine.simulator.simulation import EngineModel
        from helm_engine.simulator.trace import make_trace
        from helm_engine.simulator.workloads import builtin_or_file, load_workload
        from model_executor.cost_profile import load_cost_profile

        if self.trace_file is not None:
            recording, remarks = read_recording(self.trace_file)
            for remark in remarks:
                print(f"helm-engine: {remark}", file=sys.stderr)
            engine = recording.engine(device_of(recording, profile))
            return recording.trace(recording.workload(engine.setting), scale), engine
        assert self.workload is not None
        workload = load_workload(self.workload, self.setting)
        if engines > 1:
            workload = cluster_workload(workload, engines)
        data = workload.resolved_setting
        device = load_cost_profile(builtin_or_file("profiles", profile or data.profile, "profile"))
        return make_trace(workload, self.seed, scale=scale), EngineModel(data, device)


def _split(text: str) -> tuple[float, float]:
    """`SECONDS:SHARE`."""
    when, _, share = text.partition(":")
    try:
        split = float(when), float(share)
    except ValueError:
        raise CommandError(f"--at: {text!r} is not SECONDS:SHARE") from None
    if not (0.0 <= split[0] < float("inf") and 0.0 <= split[1] <= 1.0):
        raise CommandError(f"--at: {text!r}: seconds are at least 0, the share within 0..1")
    return split


def _checked(
    controller: str | None, at: list[str], json_file: Path | None, step_log: Path | None
) -> list[tuple[float, float]]:
    """Looks at the flags before anything is run; returns the schedule.

    Raises:
        CommandError: names the flag.
    """
    for flag, path in (("--json", json_file), ("--step-log", step_log)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise CommandError(f"{flag}: {path}: cannot be written there")
    if controller is not None and at:
        raise CommandError("--at: a controller decides on the split; leave it or --controller out")
    return [_split(text) for text in at]


@takes_option_groups
def simulate(
    requests: RequestOptions,
    cluster: ClusterOptions,
    emb_fraction: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.0, max=1.0, help="EMB share of the pages, 0 to 1."),
    ],
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECONDS:SHARE",
            help="Ask for another split so long after the warm-up; repeat it for a schedule.",
        ),
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Who moves the boundary (docs/controller.md); not with --at."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What work costs on the device: a cost profile, instead of the setting's own.",
        ),
    ] = None,
    scale: _Scale = 1,
    json_file: _JsonFile = None,
    step_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Write what every step did, as NumPy arrays."),
    ] = None,
) -> None:
    """Run a workload, or recorded requests, through the engine in virtual time."""
    splits = _checked(controller, at or [], json_file, step_log)
    requests.check()
    cluster.check()
    from helm_engine.controller.controller_config import ControllerConfig
    from helm_engine.simulator import figures
    from helm_engine.simulator.cluster import simulate_cluster
    from helm_engine.simulator.simulation import simulate as run
    from helm_engine.simulator.workloads import as_json

    try:
        with SlowNotice() as notice:
            notice.say("making requests")
            trace, engine = requests.made(profile, scale, cluster.engines or 1)
            model = replace(engine, controller=ControllerConfig(name=controller), scale=scale)
            wanted, device = trace.workload, model.profile
            schedule = [(wanted.warm_up_s + when, share) for when, share in splits]
            notice.say(f"running {len(trace)} requests")
            if cluster.engines is None:
                result = run(trace, model, emb_fraction, schedule)
                told, steps = figures.as_json(result), result.steps
            else:
                engines = cluster.model(model, emb_fraction, requests.seed)
                found = simulate_cluster(trace, engines, schedule)
                result, told = found.result, {**cluster.as_json(engines), **found.as_json()}
                steps = found.steps_with_engines()
    except ValueError as error:
        raise CommandError(str(error)) from error
    regimes = figures.figures_by_regime(result)
    Console().print(_table([*regimes, figures.figures(result)], model.setting.slo_ms))
    about = {
        "trace": None if requests.trace_file is None else str(requests.trace_file),
        "workload": as_json(wanted),
        "setting": as_json(model.setting),
        "profile": asdict(device),
        "emb_fraction_at_start": emb_fraction,
        "controller": controller,
        "schedule": splits,
        "seed": requests.seed,
        "scale": scale,
    }
    _write({**about, "result": told}, steps, json_file, step_log)


def _write(
    told: dict[str, Any],
    steps: dict[str, FloatArray],
    json_file: Path | None,
    step_log: Path | None,
) -> None:
    """Writes the files that were asked for.

    Raises:
        CommandError: one cannot be written.
    """
    from helm_engine.simulator.step_log import write_steps

    try:
        if json_file is not None:
            json_file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if step_log is not None:
            write_steps(step_log, steps)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def _table(lines: list[Figures], slo_ms: float) -> Table:
    """A line for each regime, and one for all."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("regime")
    headings = ["requests", "failed", "req/s", "p50 ms", "p99 ms", f"within {slo_ms:g} ms"]
    for heading in [*headings, "KV hits", "EMB hits", "EMB share"]:
        table.add_column(heading, justify="right")
    for line in lines:
        times = ["-" if one is None else f"{one:.1f}" for one in (line.p50_ms, line.p99_ms)]
        shares = [
            "-" if one is None else f"{one:.1%}"
            for one in (line.slo_share, line.kv_hit_rate, line.emb_hit_rate, line.emb_fraction)
        ]
        counts = [str(line.requests), str(line.failed), f"{line.throughput_per_s:.1f}"]
        table.add_row(line.name, *counts, *times, *shares)
    return table

"""`helm-engine plan`: what a recorded trace says of the pool, and of how many engines it takes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.option_groups import takes_option_groups
from helm_engine.entrypoints.sizes import size_in_bytes
from helm_engine.entrypoints.waiting import SlowNotice

if TYPE_CHECKING:
    from helm_engine.simulator.planning import Plan, PlanConfig
    from helm_engine.simulator.recording import Recording

EXAMPLES = """
\b
Examples:
  helm-engine serve MODEL_DIR --cost-profile costs.json --record-trace day.trace
  helm-engine plan --trace day.trace
  helm-engine plan --trace day.trace --engines 1,2,4,8 --slo-ms 60 --plot day.png
  helm-engine plan --trace day.trace --pool-bytes 16GiB --controller helm

\b
docs/planning.md says how the answers are found, and how far they go.
"""
_MOST_ENGINES = 1024


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is asked of a trace."""

    engines: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of engines that are tried.")
    ] = "1,2,4"
    controller: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Run a controller too (docs/controller.md); repeat it for several.",
        ),
    ] = None
    pool_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Another pool than the server's, such as 8GiB."),
    ] = None
    slo_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", min=0.001, help="Another service level than the server's."),
    ] = None
    warm_up: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="Requests of the first seconds are not counted; default: of a tenth of the time.",
        ),
    ] = None
    scale: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Measure with pages and rows that stand for K, a power of two up to 64.",
        ),
    ] = 1
    search_scale: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Look for the answers likewise; default: what the trace allows."
        ),
    ] = None

    def config(self) -> PlanConfig:
        """What the flags ask for.

        Raises:
            ValueError: names the flag.
        """
        from helm_engine.controller.registry import check_controller
        from helm_engine.simulator.planning import PlanConfig
        from helm_engine.simulator.scaling import check_scale

        for scale in (self.scale, self.search_scale or 1):
            check_scale(scale)
        for name in self.controller or []:
            check_controller(name, has_costs=True)
        return PlanConfig(
            engines=self._engines(),
            controllers=tuple(self.controller or ()),
            warm_up_s=self.warm_up,
            pool_bytes=None
            if self.pool_bytes is None
            else size_in_bytes("pool_bytes", self.pool_bytes),
            slo_ms=self.slo_ms,
            scale=self.scale,
            search_scale=self.search_scale,
        )

    def _engines(self) -> tuple[int, ...]:
        try:
            numbers = sorted({int(one) for one in self.engines.split(",")})
        except ValueError:
            numbers = [0]
        if not all(1 <= one <= _MOST_ENGINES for one in numbers):
            raise ValueError(
                f"--engines: {self.engines!r} must be numbers from 1 to {_MOST_ENGINES} with "
                "commas between them"
            )
        return tuple(numbers)


@takes_option_groups
def plan(
    options: PlanOptions,
    trace_file: Annotated[
        Path, typer.Option("--trace", metavar="FILE", help="What `serve --record-trace` wrote.")
    ],
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What work costs on the device: a cost profile, instead of the server's own.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", help="Draw the answers, the split over time among them."
        ),
    ] = None,
) -> None:
    """Say what a recorded trace asks for: the split, what adapting gains, how many engines."""
    _check_files(json_file, plot_file)
    from helm_engine.simulator.planning import make_plan
    from helm_engine.simulator.recording import device_of, read_recording

    try:
        config = options.config()
        recording, remarks = read_recording(trace_file)
        for remark in remarks:
            print(f"helm-engine: {remark}", file=sys.stderr)
        device = device_of(recording, profile)
        with SlowNotice() as notice:
            found = make_plan(recording, device, config, notice.say)
    except ValueError as error:
        raise CommandError(str(error)) from error
    _print(recording, found)
    about = {"trace": str(trace_file), "requests": len(recording), "profile": asdict(device)}
    try:
        if json_file is not None:
            text = json.dumps(_finite({**about, **_as_json(found)}), indent=2)
            json_file.write_text(text + "\n", encoding="utf-8")
        if plot_file is not None:
            from helm_engine.simulator.plan_plot import draw_plan

            draw_plan(plot_file, found, recording)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Looks before anything is run whether its figures can be written.

    Raises:
        CommandError: names the flag.
    """
    for flag, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise CommandError(f"{flag}: {path}: cannot be written there")
    if plot_file is None:
        return
    if find_spec("matplotlib") is None:
        raise CommandError("--plot: needs matplotlib: pip install 'helm-engine[bench]'")
    from helm_engine.bench.plot import supported_suffixes

    if plot_file.suffix not in supported_suffixes():
        raise CommandError(f"--plot: {plot_file}: the ending must be that of a picture, as .png")


def _print(recording: Recording, found: Plan) -> None:
    setting, console = found.setting, Console()
    users = len(set(recording.users.tolist()) - {0})
    console.print(
        f"{recording.name}: {len(recording)} requests of {users} users in "
        f"{recording.seconds:.0f} s; the first {found.warm_up_s:.0f} s are not counted",
        highlight=False,
    )
    console.print(_split_table(found))
    console.print(_gain(found), highlight=False)
    console.print(_engine_table(found))
    console.print(_enough(found, setting.slo_ms), highlight=False)


def _split_table(found: Plan) -> Table:
    headings = ["p50 ms", "p99 ms", f"within {found.setting.slo_ms:g} ms"]
    table = _table("split of one engine", [*headings, "device ms", "KV hits", "EMB hits", "EMB"])
    for line in found.lines:
        one = line.figures
        times = [_ms(one.p50_ms), _ms(line.p99_ms)]
        shares = [_share(one.kv_hit_rate), _share(one.emb_hit_rate), _share(one.emb_fraction)]
        table.add_row(line.name, *times, _share(one.slo_share), _ms(line.device_ms, 2), *shares)
    return table


def _gain(found: Plan) -> str:
    """What adapting could gain, in words."""
    by_name = {line.name: line for line in found.lines}
    static, schedule = by_name["best static"], by_name.get("best schedule")
    words = f"Best static split: {found.best_share:.2f} of the pool for EMB."
    if schedule is not None:
        if schedule.p99_ms < static.p99_ms:
            gain = "get rid of requests that fail"
            if isfinite(static.p99_ms):
                gain = f"lower P99 by {1.0 - schedule.p99_ms / static.p99_ms:.0%}"
            words += (
                f" Adapting could {gain}: the best schedule found over {found.num_phases} phases."
            )
        else:
            words += " No schedule was found that lowers P99."
    if found.static_ms:
        less = 1.0 - found.oracle_ms / found.static_ms
        words += f" No split of any five seconds would save the device more than {less:.1%}."
    return words


def _engine_table(found: Plan) -> Table:
    headings = ["EMB", "requests of the busiest", "busy", "p50 ms", "p99 ms"]
    headings += [f"within {found.setting.slo_ms:g} ms", "KV hits", "EMB hits"]
    table = _table("engines", headings)
    for one in found.engines:
        table.add_row(
            str(one.engines),
            f"{one.emb_fraction:.2f}",
            _share(one.busiest_share),
            _share(one.busy),
            _ms(one.p50_ms),
            _ms(one.p99_ms),
            *map(_share, (one.slo_share, one.kv_hit_rate, one.emb_hit_rate)),
        )
    return table


def _enough(found: Plan, slo_ms: float) -> str:
    """How many engines do, in words."""
    from helm_engine.simulator.planning import ENOUGH_SHARE

    enough = [one.engines for one in found.engines if one.slo_share >= ENOUGH_SHARE]
    words = (
        f"{enough[0]} of these numbers of engines is the least that answers {ENOUGH_SHARE:.0%} of "
        f"the requests within {slo_ms:g} ms."
        if enough
        else f"None of these answers {ENOUGH_SHARE:.0%} of the requests within {slo_ms:g} ms."
    )
    return words + " Users are spread by a consistent hash: a router that knows no residency."


def _table(first: str, headings: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ms(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isfinite(value) else "failed"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _as_json(found: Plan) -> dict[str, Any]:
    from helm_engine.simulator.workloads import as_json

    return {
        "setting": as_json(found.setting),
        "search_scale": found.search_scale,
        "warm_up_s": found.warm_up_s,
        "best_static_share": found.best_share,
        "splits": [asdict(line) for line in found.lines],
        "static": [
            {"emb_fraction": share, "p99_ms": p99, "device_ms": device}
            for share, (p99, device) in found.static.items()
        ],
        "phases": found.num_phases,
        "device_ms_best_static": found.static_ms,
        "device_ms_oracle": found.oracle_ms,
        "engines": [asdict(one) for one in found.engines],
    }


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value

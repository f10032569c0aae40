"""`helm-engine bench`: its flags, and what it prints."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.option_groups import takes_option_groups
from helm_engine.entrypoints.value_source import secret_option
from helm_engine.entrypoints.waiting import progress_bar

if TYPE_CHECKING:
    from helm_engine.bench.plan import Plan
    from helm_engine.bench.traffic import TrafficConfig

EXAMPLES = """
\b
Examples:
  helm-engine bench http://127.0.0.1:8000 --concurrency 8 --requests 2000
  helm-engine bench http://127.0.0.1:8000 --rate 100 --rate 200 --rate 400 \\
      --duration 30 --deadline-ms 20 --plot load.png --json load.json

\b
Open loop (--rate): Poisson arrivals, whatever the server does; a latency counts
from when its request was due. Closed loop (--concurrency): the next request is
sent when one is answered.
"""
DEFAULT_DURATION_S = 10.0
_TRAFFIC, _LOAD, _RESULTS = "Traffic", "Load", "Results"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How much is asked, and how."""

    rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="REQUESTS/S",
            min=0.001,
            rich_help_panel=_LOAD,
            help="Open loop at this rate; repeat it to try several, one after the other.",
        ),
    ] = None
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="REQUESTS",
            min=1,
            max=512,
            rich_help_panel=_LOAD,
            help="Closed loop with this many in flight; 1 where no rate is given either.",
        ),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="REQUESTS", min=1, rich_help_panel=_LOAD, help="How many, for each rate."
        ),
    ] = None
    duration: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            rich_help_panel=_LOAD,
            help="How long, for each rate; 10 where --requests is not given either.",
        ),
    ] = None
    warm_up: Annotated[
        int | None,
        typer.Option(
            metavar="REQUESTS",
            min=0,
            rich_help_panel=_LOAD,
            help="Sent first and not counted, so that users have come before; default: one for "
            "each user.",
        ),
    ] = None
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            rich_help_panel=_LOAD,
            help="After which a request is given up.",
        ),
    ] = 30.0

    def plan(self, traffic: TrafficOptions) -> Plan:
        """What the flags ask for.

        Raises:
            CommandError: two flags exclude each other.
        """
        from helm_engine.bench.plan import Plan

        if self.rate and self.concurrency is not None:
            raise CommandError("--rate: is the open loop, --concurrency the closed one; give one")
        if self.requests is not None and self.duration is not None:
            raise CommandError("--requests: says how long a run takes, as --duration; give one")
        duration = self.duration
        if duration is None and self.requests is None:
            duration = DEFAULT_DURATION_S
        return Plan(
            rates=tuple(self.rate or ()),
            concurrency=self.concurrency or 1,
            requests=self.requests,
            duration_s=duration,
            warm_up=traffic.users if self.warm_up is None else self.warm_up,
            timeout_s=self.timeout,
            deadline_ms=traffic.deadline_ms,
            seed=traffic.seed,
        )


@dataclass(frozen=True, slots=True)
class TrafficOptions:
    """Who asks, and for what."""

    users: Annotated[
        int,
        typer.Option(
            metavar="USERS",
            min=1,
            rich_help_panel=_TRAFFIC,
            help="Users who come again and again, each time with new events.",
        ),
    ] = 100
    history: Annotated[
        int | None,
        typer.Option(
            metavar="EVENTS",
            min=1,
            rich_help_panel=_TRAFFIC,
            help="Events at a user's first visit; default: half of what the model reads, at most "
            "512.",
        ),
    ] = None
    new_events: Annotated[
        int,
        typer.Option(
            metavar="EVENTS",
            min=1,
            rich_help_panel=_TRAFFIC,
            help="Events that join from one visit to the next.",
        ),
    ] = 10
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="ITEMS",
            min=0,
            rich_help_panel=_TRAFFIC,
            help="Items to score; 0 = retrieve from the whole catalogue; default: 100, or what "
            "the server allows.",
        ),
    ] = None
    top_k: Annotated[
        int,
        typer.Option(
            metavar="ITEMS", min=1, rich_help_panel=_TRAFFIC, help="Items of an answer, at most."
        ),
    ] = 10
    item_zipf: Annotated[
        float,
        typer.Option(
            metavar="EXPONENT",
            min=0.0,
            max=10.0,
            rich_help_panel=_TRAFFIC,
            help="Zipf exponent of the items' popularity; 0 = all alike.",
        ),
    ] = 1.0
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MILLISECONDS",
            min=0.001,
            rich_help_panel=_TRAFFIC,
            help="Deadline of each request; goodput is what is answered within it.",
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=_TRAFFIC, help="Of the traffic and the arrivals.")
    ] = 0

    def config(self) -> TrafficConfig:
        """The traffic of these flags."""
        from helm_engine.bench.traffic import TrafficConfig

        return TrafficConfig(**asdict(self))


@dataclass(frozen=True, slots=True)
class ResultOptions:
    """Where the figures go, beside the terminal."""

    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", rich_help_panel=_RESULTS, help="Write the figures as JSON."
        ),
    ] = None
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            rich_help_panel=_RESULTS,
            help="Draw latencies and goodput over the load.",
        ),
    ] = None

    def check(self) -> None:
        """Looks before the load is run whether its figures can be written.

        Raises:
            CommandError: names the flag.
        """
        for flag, path in (("--json", self.json_file), ("--plot", self.plot_file)):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise CommandError(f"{flag}: {path}: cannot be written there")
        if self.plot_file is not None:
            _require("matplotlib")
            from helm_engine.bench.plot import supported_suffixes

            if self.plot_file.suffix.lower() not in supported_suffixes():
                supported = ", ".join(supported_suffixes())
                raise CommandError(f"--plot: {self.plot_file}: must end with one of {supported}")


@takes_option_groups
def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of a running server.")],
    load: LoadOptions,
    traffic: TrafficOptions,
    results: ResultOptions,
    api_key: Annotated[
        str | None, secret_option("Key of the server.", metavar="KEY", envvar="HELM_API_KEY")
    ] = None,
) -> None:
    """Put load on a running server and report latencies, goodput and cache hits."""
    _require("aiohttp")
    results.check()
    from helm_engine.bench import report
    from helm_engine.bench.plan import run_plan
    from helm_engine.bench.target import find_target
    from helm_engine.bench.traffic import request_bodies

    plan, config = load.plan(traffic), traffic.config()
    try:
        target = asyncio.run(find_target(url, api_key))
        bodies = request_bodies(target, config)
        with progress_bar() as progress:
            runs = run_plan(target, bodies, plan, api_key, progress)
    except ValueError as error:
        raise CommandError(str(error)) from error
    Console().print(report.table_of(runs, plan.deadline_ms))
    for remark in report.remarks_of(runs):
        print(remark, file=sys.stderr)
    about = {
        "address": target.address,
        "model": target.model_name,
        "version": target.version,
        "traffic": asdict(config),
        "plan": asdict(plan),
    }
    try:
        if results.json_file is not None:
            report.write_json(results.json_file, about, runs)
        if results.plot_file is not None:
            from helm_engine.bench.plot import write_plot

            write_plot(results.plot_file, runs, target.model_name, plan.deadline_ms)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def _require(module: str) -> None:
    if find_spec(module) is None:
        raise CommandError(
            f"{module} is not installed; pip install 'helm-engine[bench]' brings what bench needs"
        )

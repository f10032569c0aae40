"""`helm-engine run-batch`: its files, and what it says of how it went."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.engine_options import EngineOptions, takes_engine_options
from helm_engine.entrypoints.ray_options import PANEL as RAY_PANEL
from helm_engine.entrypoints.ray_options import RayOptions, needs_ray
from helm_engine.entrypoints.waiting import SlowNotice
from helm_engine.exceptions import HelmError

if TYPE_CHECKING:
    from helm_engine.batch.run import Answer

_FILES = "Files"


@takes_engine_options
def run_batch(
    options: EngineOptions,
    ray: RayOptions,
    notice: SlowNotice,
    source: Annotated[
        Path,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            envvar="HELM_INPUT",
            rich_help_panel=_FILES,
            help="JSON lines to answer, or a .parquet table.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            envvar="HELM_OUTPUT",
            rich_help_panel=_FILES,
            help="Where answers go, in the same forms; one of an earlier run over the same input "
            "is completed.",
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(
            metavar="MODEL_DIR",
            rich_help_panel=_FILES,
            help="Directory with config.json and safetensors.",
        ),
    ],
    num_engines: Annotated[
        int,
        typer.Option(
            metavar="ENGINES",
            min=1,
            rich_help_panel=RAY_PANEL,
            help="Engines that --ray runs, each with a pool of --pool-bytes.",
        ),
    ] = 1,
) -> None:
    """Answer a file of OpenAI batch lines, without a server; stopped, it goes on when run again."""
    notice.say("loading torch")
    from helm_engine.batch.run import run_batch as run

    options.start_logging()
    try:
        config = options.resolve(model)
        ray.check(config)
        answer = _answer(ray, num_engines)
        count = run(config, source, target, notice.say, answer)
    except (ValueError, HelmError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise CommandError(said) from error
    except KeyboardInterrupt:
        notice.end()
        print(f"interrupted; the same command goes on with {target}", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    notice.end()
    if count.kept:
        all_kept = count.kept == count.succeeded + count.failed
        rest = "; nothing was left to do" if all_kept else ""
        print(f"{target}: {count.kept} lines were there already{rest}", file=sys.stderr)
    print(f"{count.succeeded} answered, {count.failed} failed", file=sys.stderr)


def _answer(ray: RayOptions, num_engines: int) -> Answer:
    """What answers the lines.

    Raises:
        ValueError: several engines are wanted without Ray, or it is not installed.
    """
    from helm_engine.batch.run import answer_here

    if not ray.ray:
        if num_engines > 1:
            raise ValueError("num_engines: several need --ray")
        return answer_here
    with needs_ray():
        from helm_engine.batch.ray_answers import RayAnswers
    return RayAnswers(num_engines, ray.cpus_each(num_engines), ray.ray_address)

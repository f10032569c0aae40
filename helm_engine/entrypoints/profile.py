"""`helm-engine profile`: what work costs on this machine, as a cost profile."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.engine_options import EngineOptions, takes_engine_options
from helm_engine.entrypoints.waiting import SlowNotice
from helm_engine.exceptions import HelmError

EXAMPLES = """
\b
Examples:
  helm-engine profile MODEL_DIR --out profile.json
  helm-engine profile MODEL_DIR --host-tier redis://rows:6379/0 --out profile.json
  helm-engine serve MODEL_DIR --cost-profile profile.json --controller marginal

\b
Measure with the flags that the engine will be served with, on a machine with nothing else to do.
"""
_OWN = "Measuring"


@takes_engine_options
def profile(
    options: EngineOptions,
    notice: SlowNotice,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            envvar="HELM_MODEL",
            help="Directory with config.json and safetensors.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", rich_help_panel=_OWN, help="Where the profile goes, as JSON."),
    ],
    batches: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=20,
            rich_help_panel=_OWN,
            help="How many times requests are sent: one, or a few at once.",
        ),
    ] = 150,
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=_OWN, help="Of their sizes and items.")
    ] = 0,
) -> None:
    """Measure what work costs on this machine, for --cost-profile and the simulator."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise CommandError(f"--out: {out}: cannot be written there")
    notice.say("loading torch")
    from helm_engine.clock import SystemClock
    from helm_engine.engine_loader import load_engine
    from helm_engine.profiling import describe_device, measure_profile

    options.start_logging()
    notice.say(f"loading {model}")
    try:
        config = options.resolve(model)
        engine = load_engine(config, SystemClock())
        notice.say("measuring")
        try:
            measured = measure_profile(
                engine,
                device=describe_device(engine),
                source=f"helm-engine profile, {config.model_name}, {config.executor.dtype}",
                batches=batches,
                seed=seed,
            )
        finally:
            engine.runner.close()
        text = json.dumps(asdict(measured.profile), indent=2)
        out.write_text(text + "\n", encoding="utf-8")
    except (ValueError, RuntimeError, HelmError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename or model}: {error.strerror or error}") from error
    notice.end()
    middle, late = measured.relative_errors
    print(
        f"{out}: from {measured.num_steps} steps; it tells half of them to {middle:.0%}, "
        f"nine of ten to {late:.0%}"
    )

"""`helm-engine train-controller`: the controller's base policy, out of the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.entrypoints.command import CommandError

_PERIOD_S = ControllerConfig().period_s

EXAMPLES = """
\b
Examples:
  helm-engine train-controller --out runs/1
  helm-engine train-controller --out runs/2 --seed 2 --max-requests 500000 --scale 64

\b
Needs the extra train: pip install "helm-engine[train]". docs/controller.md says what
is trained over what, and how to use the result.
"""


def train_controller(
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where policy.safetensors, curve.json and checkpoints go."
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 1,
    scale: Annotated[
        int, typer.Option(metavar="K", help="Of the simulation, a power of two from 16 to 64.")
    ] = 16,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Simulated requests after which training ends.")
    ] = 4_000_000,
    max_minutes: Annotated[
        float, typer.Option(min=0.0, help="Minutes after which it ends too.")
    ] = 60.0,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="Engines that are simulated at once.")
    ] = 6,
    control_period: Annotated[
        float, typer.Option(help="Seconds from one query of the policy to the next, 0.25 to 5.")
    ] = _PERIOD_S,
) -> None:
    """Train the allocation controller's base policy in virtual time."""
    if scale not in (16, 32, 64):
        raise CommandError(f"--scale: must be 16, 32 or 64, not {scale}")
    try:
        from helm_engine.simulator.train_controller import TrainingConfig, train
    except ModuleNotFoundError as error:
        raise CommandError(
            f'{error.name} is not installed: pip install "helm-engine[train]"'
        ) from error
    try:
        config = TrainingConfig(
            seed=seed,
            scale=scale,
            max_requests=max_requests,
            max_minutes=max_minutes,
            processes=processes,
            control=ControllerConfig(period_s=control_period),
        )
        console = Console(highlight=False)
        train(config, out, console.print)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"--out: {error.filename}: {error.strerror}") from error
    console.print(f"wrote {out / 'policy.safetensors'}")

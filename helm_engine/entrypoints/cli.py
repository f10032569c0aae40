"""The command `helm-engine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.progress import TaskProgressColumn

from helm_engine.entrypoints.bench import EXAMPLES as BENCH_EXAMPLES
from helm_engine.entrypoints.bench import bench
from helm_engine.entrypoints.boundary import EXAMPLES as BOUNDARY_EXAMPLES
from helm_engine.entrypoints.boundary import boundary
from helm_engine.entrypoints.command import CommandError, HelmCommand, HelmGroup
from helm_engine.entrypoints.engine import EXAMPLES as ENGINE_EXAMPLES
from helm_engine.entrypoints.engine import engine
from helm_engine.entrypoints.engine_options import (
    ENGINE_CONTEXT,
)
from helm_engine.entrypoints.plan import EXAMPLES as PLAN_EXAMPLES
from helm_engine.entrypoints.plan import plan
from helm_engine.entrypoints.profile import EXAMPLES as PROFILE_EXAMPLES
from helm_engine.entrypoints.profile import profile
from helm_engine.entrypoints.publish_rows import EXAMPLES as PUBLISH_EXAMPLES
from helm_engine.entrypoints.publish_rows import publish_rows
from helm_engine.entrypoints.run_batch import run_batch
from helm_engine.entrypoints.serve import serve
from helm_engine.entrypoints.simulate import EXAMPLES as SIMULATE_EXAMPLES
from helm_engine.entrypoints.simulate import simulate
from helm_engine.entrypoints.train_controller import EXAMPLES as TRAIN_EXAMPLES
from helm_engine.entrypoints.train_controller import train_controller
from helm_engine.entrypoints.waiting import progress_bar
from helm_engine.version import __version__

app = typer.Typer(
    name="helm-engine",
    cls=HelmGroup,
    help="Serve generative recommenders out of one paged memory pool.",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the boxed one cuts long flags off on a narrow terminal.
    rich_markup_mode=None,
)


_PRECEDENCE = """

\b
Each value comes from its flag, else from its HELM_ variable, else from the file
of --config, else from the default; --dump-config shows which.
"""
_SERVE_EXAMPLES = f"""
\b
Examples:
  helm-engine serve examples/models/hstu-ml-100k
  helm-engine serve MODEL_DIR --pool-bytes 8GiB --emb-fraction 0.3 --device cuda
  helm-engine serve MODEL_DIR --num-engines 4
  HELM_PORT=9000 helm-engine serve MODEL_DIR --config engine.toml
  helm-engine serve MODEL_DIR --pool-bytes 8GiB --dump-config > engine.toml
{_PRECEDENCE}"""
_RUN_BATCH_EXAMPLES = f"""
\b
Examples:
  helm-engine run-batch -i in.jsonl -o out.jsonl --model MODEL_DIR
  helm-engine run-batch -i in.jsonl -o out.jsonl --config engine.toml
{_PRECEDENCE}"""
_CONVERT_EXAMPLES = """
\b
Examples:
  helm-engine convert --dialect stu checkpoint/ model/ --config fields.json
  helm-engine convert --dialect research hstu.pt model/ --config fields.json

\b
docs/convert.md lists what each dialect's checkpoint does not say.
"""


def _fail(message: object) -> NoReturn:
    raise CommandError(str(message))


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve generative recommenders out of one paged memory pool."""
    if version:
        print(f"helm-engine {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command(cls=HelmCommand, context_settings=ENGINE_CONTEXT, epilog=_SERVE_EXAMPLES)(serve)


app.command(cls=HelmCommand, context_settings=ENGINE_CONTEXT, epilog=ENGINE_EXAMPLES + _PRECEDENCE)(
    engine
)


app.command(
    "run-batch", cls=HelmCommand, context_settings=ENGINE_CONTEXT, epilog=_RUN_BATCH_EXAMPLES
)(run_batch)


app.command(cls=HelmCommand, epilog=BENCH_EXAMPLES)(bench)


app.command(cls=HelmCommand, epilog=BOUNDARY_EXAMPLES)(boundary)


app.command(
    cls=HelmCommand, context_settings=ENGINE_CONTEXT, epilog=PROFILE_EXAMPLES + _PRECEDENCE
)(profile)


app.command(cls=HelmCommand, epilog=SIMULATE_EXAMPLES)(simulate)
app.command(cls=HelmCommand, epilog=PLAN_EXAMPLES)(plan)
app.command("train-controller", cls=HelmCommand, epilog=TRAIN_EXAMPLES)(train_controller)


app.command("publish-rows", cls=HelmCommand, epilog=PUBLISH_EXAMPLES)(publish_rows)


@app.command(cls=HelmCommand, epilog=_CONVERT_EXAMPLES)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint file or directory.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Model directory to make.")],
    dialect: Annotated[
        Literal["research", "stu", "nvidia"], typer.Option(help="Whose checkpoint it is.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="JSON fields of config.json that the checkpoint does not say."),
    ] = None,
) -> None:
    """Make a model directory of a public checkpoint."""
    from model_executor.converters.convert import convert_checkpoint, describe

    try:
        with progress_bar(TaskProgressColumn()) as progress:

            def watch(table: str, numbers: int) -> Callable[[int], None]:
                return partial(progress.advance, progress.add_task(table, total=numbers))

            conversion = convert_checkpoint(dialect, source, target, config, watch)
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    print(f"{target}: {describe(conversion)}")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

"""The command `helm-engine`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from helm_engine.entrypoints.engine_options import EngineOptions, takes_engine_options
from helm_engine.exceptions import HelmError
from helm_engine.version import __version__

if TYPE_CHECKING:
    from helm_engine.engine_loader import LoadedEngine

app = typer.Typer(
    name="helm-engine",
    help="Serve generative recommenders out of one paged memory pool.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the boxed one cuts long flags off on a narrow terminal.
    rich_markup_mode=None,
)


def _fail(message: object) -> NoReturn:
    print(f"helm-engine: error: {message}", file=sys.stderr)
    raise typer.Exit(2)


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve generative recommenders out of one paged memory pool."""
    if version:
        print(f"helm-engine {__version__}")
        raise typer.Exit


@app.command()
@takes_engine_options
def serve(
    options: EngineOptions,
    model_dir: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8000,
    shutdown_timeout: Annotated[
        int, typer.Option(min=0, help="Seconds that requests in flight have after SIGTERM.")
    ] = 10,
) -> None:
    """Serve a model over HTTP until SIGTERM."""
    # Until the server has its own handler: a stop while the model loads is no failure either.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    # Loaded here: `--help` must not wait for torch.
    from helm_engine.entrypoints import api_server

    options.start_logging()
    try:
        config = options.resolve(model_dir)
        bound = api_server.open_socket(host, port)
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{host}:{port}: cannot listen: {error.strerror}; --port picks another")

    def announce(engine: LoadedEngine) -> None:
        print(_welcome(engine, host, bound.getsockname()[1]), flush=True)

    try:
        api_server.serve(config, bound, announce, shutdown_timeout)
    except (ValueError, HelmError) as error:
        _fail(error)


def _welcome(engine: LoadedEngine, host: str, port: int) -> str:
    """What the operator sees once the server can be reached."""
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    memory, layout = engine.runner.memory, engine.layout
    return (
        f"HELM Engine {__version__} serves {engine.config.model_name} on {address}\n"
        f"pool: {layout.num_pages} pages of {layout.page_bytes} bytes "
        f"(KV {layout.num_kv_pages}, EMB {layout.num_emb_pages}), "
        f"{memory.staging} bytes of staging; weights: {memory.weights} bytes; "
        f"activations: at most {engine.activation_bound} bytes\n"
        "Try it:\n\n"
        f"curl -s {address}/v1/recommend -H 'Content-Type: application/json' "
        f"-d '{json.dumps(_request_to_paste(engine))}'\n"
    )


def _request_to_paste(engine: LoadedEngine) -> dict[str, Any]:
    from helm_engine.sample_request import sample_request

    model = engine.model_config
    items = [min(item, model.num_item_rows - 1) for item in (50, 172, 181)]
    retrieves = engine.runner.retrieval_head is not None
    body = sample_request(model, items, [100, 160, 220], None if retrieves else items)
    return {"user": "demo", **body, "top_k": 3, "exclude_history": retrieves}


@app.command("run-batch")
@takes_engine_options
def run_batch(
    options: EngineOptions,
    source: Annotated[
        Path, typer.Option("--input", "-i", help="JSON lines to answer, or a .parquet table.")
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Where answers go, in the same forms; one of an earlier run "
            "over the same input is completed.",
        ),
    ],
    model_dir: Annotated[
        Path, typer.Option("--model", help="Directory with config.json and safetensors.")
    ],
) -> None:
    """Answer a file of OpenAI batch lines, without a server; stopped, it goes on when run again."""
    from helm_engine.batch.run import run_batch as run
    from helm_engine.entrypoints.progress import LateProgress

    options.start_logging()
    try:
        with LateProgress() as progress:
            count = run(options.resolve(model_dir), source, target, progress.report)
    except (ValueError, HelmError) as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with {target}", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    if count.kept:
        all_kept = count.kept == count.succeeded + count.failed
        rest = "; nothing was left to do" if all_kept else ""
        print(f"{target}: {count.kept} lines were there already{rest}", file=sys.stderr)
    print(f"{count.succeeded} answered, {count.failed} failed", file=sys.stderr)


@app.command()
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
        conversion = convert_checkpoint(dialect, source, target, config)
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

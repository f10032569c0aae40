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
    from helm_engine.served_model import ServedModel

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
        float, typer.Option(min=0, help="Seconds that requests in flight have after SIGTERM.")
    ] = 10,
    hang_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds of silence after which the engine is started anew."),
    ] = 30,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that lets a client ask; may be repeated. Others see the flag: "
            "prefer the environment or a file."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with such keys, one a line.")
    ] = None,
    admin_key: Annotated[
        list[str] | None, typer.Option(help="Key that lets an operator reload; may be repeated.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="File with such keys, one a line.")
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="URL that OpenTelemetry spans are sent to (extra otel).")
    ] = None,
) -> None:
    """Serve a model over HTTP until SIGTERM."""
    # Until the server has its own handler: a stop while the model loads is no failure either.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    # Loaded here: `--help` must not wait for torch.
    from helm_engine.config import ServerConfig
    from helm_engine.entrypoints import api_server, http_server
    from helm_engine.entrypoints.api_keys import read_key_file

    options.start_logging()
    try:
        config = options.resolve(model_dir)
        server = ServerConfig(
            shutdown_timeout=shutdown_timeout,
            hang_timeout=hang_timeout,
            api_keys=(*(api_key or ()), *(read_key_file(api_key_file) if api_key_file else ())),
            admin_keys=(
                *(admin_key or ()),
                *(read_key_file(admin_key_file) if admin_key_file else ()),
            ),
            otlp_traces_endpoint=otlp_traces_endpoint,
        )
        bound = http_server.open_socket(host, port)
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{host}:{port}: cannot listen: {error.strerror}; --port picks another")

    def announce(served: ServedModel) -> None:
        print(_welcome(served, host, bound.getsockname()[1]), flush=True)

    try:
        api_server.serve(config, server, bound, announce)
    except (ValueError, OSError, RuntimeError, HelmError) as error:
        _fail(error)


def _welcome(served: ServedModel, host: str, port: int) -> str:
    """What the operator sees once the server can be reached."""
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    memory, layout = served.memory, served.layout
    return (
        f"HELM Engine {__version__} serves {served.name} on {address}\n"
        f"pool: {layout.num_pages} pages of {layout.page_bytes} bytes "
        f"(KV {layout.num_kv_pages}, EMB {layout.num_emb_pages}), "
        f"{memory.staging} bytes of staging; weights: {memory.weights} bytes; "
        f"activations: at most {served.activation_bound} bytes\n"
        "Try it:\n\n"
        f"curl -s {address}/v1/recommend -H 'Content-Type: application/json' "
        f"-d '{json.dumps(_request_to_paste(served))}'\n"
    )


def _request_to_paste(served: ServedModel) -> dict[str, Any]:
    from helm_engine.sample_request import sample_request

    model = served.model_config
    items = [min(item, model.num_item_rows - 1) for item in (50, 172, 181)]
    retrieves = served.can_retrieve
    body = sample_request(model, items, [100, 160, 220], None if retrieves else items)
    return {"user": "demo", **body, "top_k": 3, "exclude_history": retrieves}


@app.command("run-batch")
@takes_engine_options
def run_batch(
    options: EngineOptions,
    source: Annotated[Path, typer.Option("--input", "-i", help="JSON lines to answer.")],
    target: Annotated[Path, typer.Option("--output", "-o", help="Where answers go.")],
    model_dir: Annotated[
        Path, typer.Option("--model", help="Directory with config.json and safetensors.")
    ],
) -> None:
    """Answer a file of OpenAI batch lines, without a server."""
    from helm_engine import batch
    from helm_engine.recommender import Recommender

    options.start_logging()
    try:
        batch.check_files(source, target)
        recommender = Recommender.from_config(options.resolve(model_dir))
        counted = batch.run_batch(recommender, source, target)
    except (ValueError, HelmError) as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    print(f"{counted.succeeded} answered, {counted.failed} failed", file=sys.stderr)


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

"""The command `helm-engine`."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.logging import RichHandler

from block_manager.pool_layout import PoolConfig
from helm_engine.config import EngineConfig, ExecutorConfig, SchedulerConfig
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
)

ModelDir = Annotated[Path, typer.Argument(help="Directory with config.json and safetensors.")]
ModelOption = Annotated[
    Path, typer.Option("--model", help="Directory with config.json and safetensors.")
]
PoolBytes = Annotated[str, typer.Option(help="Size of the page pool, for instance 64MiB or 8GiB.")]
EmbFraction = Annotated[float, typer.Option(help="Share of the pool for embedding rows, 0 to 1.")]
BlockTokens = Annotated[int, typer.Option(help="History tokens of one KV block.")]
MaxBatchedTokens = Annotated[
    int, typer.Option(help="History tokens and candidates of one step together.")
]
MaxSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
MaxWaiting = Annotated[
    int, typer.Option(help="Requests that may wait beyond those; further ones get 429.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
ServedName = Annotated[
    str | None, typer.Option(help="Name of the model in requests; default: the directory's.")
]
Poison = Annotated[
    bool, typer.Option(help="Debugging: fill freed memory with NaN, so that reading it shows.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what the engine does.")]

_POOL = PoolConfig()
_SCHEDULER = SchedulerConfig()
_POOL_BYTES = f"{_POOL.pool_bytes >> 20}MiB"


@dataclass(frozen=True, slots=True)
class _EngineOptions:
    """Flags that every command with an engine takes."""

    model_dir: Path
    pool_bytes: str
    emb_fraction: float
    block_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_waiting: int
    device: str
    served_model_name: str | None
    poison_freed_memory: bool

    def resolve(self) -> EngineConfig:
        """Builds the configuration.

        Raises:
            ValueError: names the field and its limit.
        """
        try:
            pool_bytes = TypeAdapter(ByteSize).validate_python(self.pool_bytes)
        except ValidationError:
            raise ValueError(
                f"pool_bytes: {self.pool_bytes!r} is not a size such as 64MiB"
            ) from None
        return EngineConfig(
            model_dir=self.model_dir,
            pool=PoolConfig(int(pool_bytes), self.emb_fraction, self.block_tokens),
            scheduler=SchedulerConfig(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_seqs=self.max_num_seqs,
                max_num_waiting=self.max_num_waiting,
            ),
            executor=ExecutorConfig(device=self.device),
            served_model_name=self.served_model_name,
            poison_freed_memory=self.poison_freed_memory,
        )


def _fail(message: object) -> NoReturn:
    print(f"helm-engine: error: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _start_logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve generative recommenders out of one paged memory pool."""
    if version:
        print(f"helm-engine {__version__}")
        raise typer.Exit


@app.command()
def serve(
    model_dir: ModelDir,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8000,
    pool_bytes: PoolBytes = _POOL_BYTES,
    emb_fraction: EmbFraction = _POOL.emb_fraction,
    block_tokens: BlockTokens = _POOL.block_tokens,
    max_num_batched_tokens: MaxBatchedTokens = _SCHEDULER.max_num_batched_tokens,
    max_num_seqs: MaxSeqs = _SCHEDULER.max_num_seqs,
    max_num_waiting: MaxWaiting = _SCHEDULER.max_num_waiting,
    device: Device = "cpu",
    served_model_name: ServedName = None,
    poison_freed_memory: Poison = False,
    shutdown_timeout: Annotated[
        int, typer.Option(min=0, help="Seconds that requests in flight have after SIGTERM.")
    ] = 10,
    verbose: Verbose = False,
) -> None:
    """Serve a model over HTTP until SIGTERM."""
    # Until the server has its own handler: a stop while the model loads is no failure either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Loaded here: `--help` must not wait for torch.
    from helm_engine.entrypoints import api_server

    _start_logging(verbose)
    options = _EngineOptions(
        model_dir, pool_bytes, emb_fraction, block_tokens,
        max_num_batched_tokens, max_num_seqs, max_num_waiting, device, served_model_name,
        poison_freed_memory,
    )  # fmt: skip
    try:
        config = options.resolve()
        bound = api_server.open_socket(host, port)
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{host}:{port}: cannot listen: {error.strerror}")

    def announce(engine: LoadedEngine) -> None:
        print(_welcome(config, engine, host, bound.getsockname()[1]), flush=True)

    try:
        api_server.serve(config, bound, announce, shutdown_timeout)
    except (ValueError, HelmError) as error:
        _fail(error)


def _welcome(config: EngineConfig, engine: LoadedEngine, host: str, port: int) -> str:
    """What the operator sees once the server can be reached."""
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    last = engine.model_config.num_items
    items = ", ".join(str(min(item, last)) for item in (50, 172, 181))
    memory, layout = engine.runner.memory, engine.layout
    return (
        f"HELM Engine {__version__} serves {config.model_name} on {address}\n"
        f"pool: {layout.num_pages} pages of {layout.page_bytes} bytes "
        f"(KV {layout.num_kv_pages}, EMB {layout.num_emb_pages}), "
        f"{memory.staging} bytes of staging; weights: {memory.weights} bytes; "
        f"activations: at most {engine.activation_bound} bytes\n"
        "Try it:\n\n"
        f"curl -s {address}/v1/recommend -H 'Content-Type: application/json' -d "
        f"""'{{"user": "demo", "history": {{"item_ids": [{items}], """
        """"timestamps": [100, 160, 220]}, "top_k": 5, "exclude_history": true}'\n"""
    )


@app.command("run-batch")
def run_batch(
    source: Annotated[Path, typer.Option("--input", "-i", help="JSON lines to answer.")],
    target: Annotated[Path, typer.Option("--output", "-o", help="Where answers go.")],
    model_dir: ModelOption,
    pool_bytes: PoolBytes = _POOL_BYTES,
    emb_fraction: EmbFraction = _POOL.emb_fraction,
    block_tokens: BlockTokens = _POOL.block_tokens,
    max_num_batched_tokens: MaxBatchedTokens = _SCHEDULER.max_num_batched_tokens,
    max_num_seqs: MaxSeqs = _SCHEDULER.max_num_seqs,
    max_num_waiting: MaxWaiting = _SCHEDULER.max_num_waiting,
    device: Device = "cpu",
    served_model_name: ServedName = None,
    poison_freed_memory: Poison = False,
    verbose: Verbose = False,
) -> None:
    """Answer a file of OpenAI batch lines, without a server."""
    from helm_engine import batch
    from helm_engine.recommender import Recommender

    _start_logging(verbose)
    options = _EngineOptions(
        model_dir, pool_bytes, emb_fraction, block_tokens,
        max_num_batched_tokens, max_num_seqs, max_num_waiting, device, served_model_name,
        poison_freed_memory,
    )  # fmt: skip
    try:
        counted = batch.run_batch(Recommender.from_config(options.resolve()), source, target)
    except (ValueError, HelmError) as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    print(f"{counted.succeeded} answered, {counted.failed} failed", file=sys.stderr)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

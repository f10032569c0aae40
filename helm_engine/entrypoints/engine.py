"""`helm-engine engine`: one engine without HTTP, for fronts on other hosts."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helm_engine.config import EngineConfig, ServerConfig, check_tcp_address
from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.engine_options import EngineOptions, takes_engine_options
from helm_engine.entrypoints.waiting import SlowNotice
from helm_engine.exceptions import HelmError
from helm_engine.version import __version__

if TYPE_CHECKING:
    from helm_engine.engine_host import EngineHost
    from helm_engine.engine_supervisor import EngineSupervisor

logger = logging.getLogger(__name__)

EXAMPLES = """
\b
Examples:
  helm-engine engine MODEL_DIR --listen tcp://0.0.0.0:7000
  helm-engine serve MODEL_DIR --num-engines 0 --engine tcp://10.0.0.7:7000 --user-key-file KEY

\b
Whoever reaches the address may use the engine: keep it on a private network.
"""

_PANEL = "Server"
_DEFAULTS = ServerConfig()
_DRAIN_POLL_SECONDS = 0.02
_TOLD_SECONDS = 0.3
"""Several beats: by then fronts know that it leaves."""


@takes_engine_options
def engine(
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
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=_PANEL,
            help="Where fronts reach it, tcp://host:port; port 0 picks a free one.",
        ),
    ] = "tcp://127.0.0.1:7000",
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            rich_help_panel=_PANEL,
            help="Time that requests in flight have after SIGTERM.",
        ),
    ] = _DEFAULTS.shutdown_timeout,
    hang_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            rich_help_panel=_PANEL,
            help="An engine core that is silent for so long is killed and started anew.",
        ),
    ] = _DEFAULTS.hang_timeout,
    start_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            rich_help_panel=_PANEL,
            help="An engine core that is not loaded and warm by then is given up.",
        ),
    ] = _DEFAULTS.start_timeout,
) -> None:
    """Run one engine for the fronts of other hosts, until SIGTERM; SIGHUP reloads the model."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    options.start_logging()
    notice.say(f"loading {model}")
    server = ServerConfig(
        shutdown_timeout=shutdown_timeout, hang_timeout=hang_timeout, start_timeout=start_timeout
    )
    try:
        check_tcp_address("listen", listen)
        in_order = asyncio.run(_run(options.resolve(model), server, listen, notice))
    except (ValueError, OSError, RuntimeError, HelmError) as error:
        raise CommandError(str(error)) from error
    if not in_order:
        print("helm-engine: error: the engine did not end in order", file=sys.stderr)
        raise typer.Exit(1)


async def _run(config: EngineConfig, server: ServerConfig, listen: str, notice: SlowNotice) -> bool:
    """Serves fronts; whether the engine's books were in order at its end.

    Raises what `EngineSupervisor.start` raises, and OSError if the address cannot be bound.
    """
    import zmq

    from helm_engine.engine_client import EngineClient
    from helm_engine.engine_host import EngineHost
    from helm_engine.engine_supervisor import EngineSupervisor

    start = partial(EngineClient, hang_seconds=server.hang_timeout)
    supervisor = EngineSupervisor(config, start, server.start_timeout)
    try:
        # Before the model is loaded: a taken port is known at once.
        host = EngineHost(listen, supervisor)
    except zmq.ZMQError as error:
        raise OSError(f"listen: {listen}: {error.strerror}") from error
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(_reload(supervisor))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    try:
        starting = asyncio.create_task(supervisor.start())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            served = starting.result()
            loop.add_signal_handler(signal.SIGHUP, reload)
            notice.end()
            print(f"HELM Engine {__version__} serves {served.name} to fronts on {host.address}")
            sys.stdout.flush()
            await stopping
            await _drain(host, server.shutdown_timeout)
        else:
            starting.cancel()
    finally:
        await host.close()
        in_order = await supervisor.close()
    return in_order


async def _drain(host: EngineHost, seconds: float) -> None:
    """Tells the fronts to send nothing more, and lets what they sent finish."""
    host.is_leaving = True
    until = time.monotonic() + seconds
    await asyncio.sleep(_TOLD_SECONDS)
    while host.num_in_flight and time.monotonic() < until:
        await asyncio.sleep(_DRAIN_POLL_SECONDS)


async def _reload(supervisor: EngineSupervisor) -> None:
    try:
        served = await supervisor.reload(None)
    except HelmError as error:
        logger.error("%s", error)
    else:
        logger.info("reloaded %s, version %s", served.name, served.version)

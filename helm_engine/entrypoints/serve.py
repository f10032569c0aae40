"""`helm-engine serve`: what it prints, and how it ends before it can serve."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from block_manager.exceptions import IntegrityError
from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.engine_options import EngineOptions, takes_engine_options
from helm_engine.entrypoints.fleet_options import FleetOptions
from helm_engine.entrypoints.ray_options import RayOptions, needs_ray
from helm_engine.entrypoints.server_options import ServerOptions
from helm_engine.entrypoints.waiting import SlowNotice
from helm_engine.exceptions import HelmError
from helm_engine.version import __version__

if TYPE_CHECKING:
    from helm_engine.served_model import ServedModel


@takes_engine_options
def serve(
    options: EngineOptions,
    server: ServerOptions,
    fleet: FleetOptions,
    ray: RayOptions,
    notice: SlowNotice,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            envvar="HELM_MODEL",
            help="Directory with config.json and safetensors.",
        ),
    ],
) -> None:
    """Serve a model over HTTP until SIGTERM."""
    # Until the server has its own handler: a stop while the model loads is no failure either.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    # Loaded here: `--help` must not wait for it.
    from helm_engine.entrypoints import api_server, http_server

    options.start_logging()
    notice.say(f"loading {model}")
    host, port = server.host, server.port
    try:
        config = options.resolve(model)
        front = replace(server.resolve(), fleet=fleet.resolve())
        ray.check_server(config, front)
        bound = http_server.open_socket(host, port)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"{host}:{port}: cannot listen: {error.strerror}; --port picks another"
        ) from error

    port = bound.getsockname()[1]

    def announce(served: ServedModel, num_engines: int) -> None:
        notice.end()
        print(_welcome(served, num_engines, host, port), flush=True)

    try:
        if ray.ray:
            bound.close()  # It was free: Ray Serve opens it itself.
            _ray_server().serve(config, front, ray, (host, port), announce)
        else:
            api_server.serve(config, front, bound, announce)
    except (ValueError, OSError, RuntimeError, HelmError) as error:
        raise CommandError(str(error)) from error
    except IntegrityError as error:
        print(f"helm-engine: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _ray_server() -> ModuleType:
    """What serves with Ray.

    Raises:
        ValueError: Ray is not installed.
    """
    with needs_ray():
        from helm_engine.entrypoints import ray_server
    return ray_server


def _welcome(served: ServedModel, num_engines: int, host: str, port: int) -> str:
    """What the operator sees once requests can be answered."""
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    memory, layout = served.memory, served.layout
    engines = f" with {num_engines} engines, each of which has" if num_engines > 1 else ""
    return (
        f"HELM Engine {__version__} serves {served.name} on {address}{engines}\n"
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

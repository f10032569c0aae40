"""What `helm-engine serve --ray` runs: our application, on a Ray of its own or on another."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from helm_engine.config import EngineConfig, ServerConfig
from helm_engine.entrypoints.ray_application import ENGINE, build_application
from helm_engine.entrypoints.ray_options import RayOptions
from helm_engine.fleet_members import num_cores
from helm_engine.served_model import ServedModel

APPLICATION = "helm-engine"
OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray of our own: requests are small, and none stays."""


@contextmanager
def own_ray(num_cpus: int) -> Iterator[None]:
    """A Ray of one node for as long as this lasts, which asks whoever reaches it for a token.

    Ray would write the token into the home directory. Unless the operator has said where it is, or
    that there is to be none, it is made here and known to the processes of this Ray alone. Ray
    itself turns authentication on then; a variable set now would come too late for that, and a
    token is read once, so that both stay for the life of this process.

    Args:
        num_cpus: cores that replicas may ask for; they need not be there.
    """
    if (
        not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
        and os.environ.get("RAY_AUTH_MODE") != "disabled"
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init(
        "local",
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _other_ray(address: str) -> Iterator[None]:
    """A connection to a Ray that is there already."""
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def serve(
    config: EngineConfig,
    server: ServerConfig,
    options: RayOptions,
    address: tuple[str, int],
    announce: Callable[[ServedModel, int], None],
) -> None:
    """Serves a model until SIGTERM or SIGINT.

    Args:
        config: of each engine.
        server: of each front.
        options: which Ray, and how much of it.
        address: host and port for HTTP.
        announce: called with the model and the number of engines once requests can be answered.

    Raises:
        ValueError: the model or a setting cannot be served.
        OSError: likewise.
        RuntimeError: Ray could not deploy the application; the message says why.
        ConnectionError: there is no Ray at the address.
    """
    number, own = server.fleet.num_engines, options.ray_address is None
    if own and options.ray_cpus is None:
        options = replace(options, ray_cpus=max(1, num_cores() // number))
    application = build_application(config, server, options)
    running: AbstractContextManager[None]
    if options.ray_address is None:
        running = own_ray(number * (options.ray_cpus or 1) + options.ray_fronts)
    else:
        running = _other_ray(options.ray_address)
    with running:
        # Ray has set handlers of its own.
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: sys.exit(0))
        try:
            # Where Serve runs already, it keeps its own address.
            host, port = address
            quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
            ray_serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
            ray_serve.run(application, name=APPLICATION, logging_config=quiet)
            engines = ray_serve.get_deployment_handle(ENGINE, APPLICATION)
            announce(engines.describe.remote().result(), number)
            while True:
                signal.pause()
        finally:
            for one in (signal.SIGTERM, signal.SIGINT):
                signal.signal(one, signal.SIG_IGN)
            if own:
                ray_serve.shutdown()
            else:
                ray_serve.delete(APPLICATION)

"""What `helm-engine serve --ray` runs: our application, on a Ray of its own or on another."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from helm_engine.config import EngineConfig, ServerConfig
from helm_engine.entrypoints.ray_application import ENGINE, build_application
from helm_engine.entrypoints.ray_options import RayOptions
from helm_engine.ray_session import ray_session
from helm_engine.served_model import ServedModel

APPLICATION = "helm-engine"


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
    application = build_application(config, server, options)
    num_cpus = number * options.cpus_each(number) + server.fleet.num_fronts
    with ray_session(options.ray_address, num_cpus):
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

"""The Ray Serve application: fronts that speak HTTP, and engines behind them.

`helm-engine serve --ray` deploys it, and so does anything that deploys Ray Serve applications:
`import_path: helm_engine.entrypoints.ray_application:application`, with the flags of
`helm-engine serve` as `args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fastapi import FastAPI
from pydantic import ConfigDict, TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from helm_engine.config import EngineConfig, ServerConfig
from helm_engine.engine_choice import costs_of
from helm_engine.entrypoints.api_server import ApiFront
from helm_engine.entrypoints.engine_options import EngineOptions
from helm_engine.entrypoints.fleet_options import FleetOptions
from helm_engine.entrypoints.ray_options import RayOptions
from helm_engine.entrypoints.server_options import ServerOptions
from helm_engine.input_processor import new_user_key
from helm_engine.ray_engines import RayEngines
from helm_engine.ray_replica import EngineReplica
from model_executor.checkpoint import load_config
from model_executor.cost_profile import load_cost_profile
from router.policies import policy_named
from router.ray_serve import DispatcherRouter
from router.routed_call import RouterOptions

ENGINE = "engine"
"""Name of the deployment whose replicas are the engines."""
_STATS_SECONDS = 1.0
"""Routers learn so often where replicas publish, and how far they have come."""
_HEALTH_SECONDS = 1.0
_START_ATTEMPTS = 3
"""A replica that cannot start so often fails the application."""
_HELD_BY_FRONT = 1 << 16
"""Requests that Ray Serve may hand to a front at once: the front itself refuses what is too much,
with 429 and before the body is read."""
_NOT_OF_AN_APPLICATION = ("host", "port", "ray", "ray_address")
_YAML = ConfigDict(coerce_numbers_to_str=True)
_Group = TypeVar("_Group", EngineOptions, ServerOptions, FleetOptions, RayOptions)


class RayFront:
    """A process that speaks HTTP, hashes requests and routes them to replicas."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: EngineConfig, server: ServerConfig, engines: DeploymentHandle[Any]
    ) -> None:
        """Waits until an engine is ready.

        Raises:
            EngineUnavailableError: none was in time.
        """
        assert server.fleet.user_key is not None
        members = [RayEngines(engines, server.fleet.user_key, server.start_timeout)]
        self._front = ApiFront(config, server, members)
        await self._front.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve for what answers HTTP."""
        return self._front.app


def build_application(
    config: EngineConfig, server: ServerConfig, options: RayOptions
) -> Application:
    """The application of a model.

    Args:
        config: of each engine; its paths must be there on every node.
        server: of each front; without a user key one is made.
        options: cores of each engine.

    Raises:
        ValueError: the model or a setting cannot be served.
        OSError: a file cannot be read.
    """
    options.check_server(config, server)
    fleet = server.fleet
    policy = policy_named(fleet.policy)
    num_rows = load_config(config.model_dir).num_rows
    tells_residency = policy.knows_kv or policy.knows_rows
    profile = load_cost_profile(config.cost_profile) if config.cost_profile else None
    router = RouterOptions(
        policy=fleet.policy,
        costs=costs_of(profile),
        num_rows=num_rows,
        num_positions=min(num_rows, config.residency.digest_positions) if tells_residency else 0,
    )
    server = replace(server, fleet=replace(fleet, user_key=fleet.user_key or new_user_key()))
    engines = serve.deployment(
        name=ENGINE,
        num_replicas=fleet.num_engines,
        max_ongoing_requests=config.scheduler.max_num_held,
        ray_actor_options={
            "num_cpus": options.cpus_each(fleet.num_engines),
            "num_gpus": 1 if config.executor.device == "cuda" else 0,
        },
        request_router_config={
            "request_router_class": DispatcherRouter,
            "request_router_kwargs": router.as_kwargs(),
            "request_routing_stats_period_s": _STATS_SECONDS,
        },
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=server.shutdown_timeout,
        max_constructor_retry_count=_START_ATTEMPTS,
    )(EngineReplica)
    fronts = serve.deployment(
        name="front",
        num_replicas=fleet.num_fronts,
        max_ongoing_requests=_HELD_BY_FRONT,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=server.shutdown_timeout,
        max_constructor_retry_count=_START_ATTEMPTS,
    )(serve.ingress()(RayFront))
    return fronts.bind(
        config,
        server,
        engines.bind(config, server.hang_timeout, server.start_timeout, tells_residency),
    )


def application(args: Mapping[str, Any]) -> Application:
    """Builds the application of what a Serve configuration says.

    Args:
        args: `model`, the directory, and flags of `helm-engine serve` by their names with
            underscores.

    Raises:
        ValueError: names the argument.
        OSError: a file cannot be read.
    """
    left = dict(args)
    for name in _NOT_OF_AN_APPLICATION:
        if name in left:
            raise ValueError(f"{name}: is for the command line; a cluster's owner decides on it")
    if "model" not in left:
        raise ValueError("model: must be given")
    model = Path(left.pop("model"))
    engine, server = _options(EngineOptions, left), _options(ServerOptions, left)
    fleet, options = _options(FleetOptions, left), _options(RayOptions, left)
    if left:
        raise ValueError(f"{', '.join(left)}: is no flag of helm-engine serve")
    return build_application(
        engine.resolve(model),
        replace(server.resolve(), fleet=fleet.resolve()),
        replace(options, ray=True, ray_address="auto"),  # The one that builds it.
    )


def _options(group: type[_Group], left: dict[str, Any]) -> _Group:
    """Takes a group's values out of what is left, as YAML has them.

    Raises:
        ValueError: names one that is of another type.
    """
    types = get_type_hints(group)
    values: dict[str, Any] = {}
    for name in [field.name for field in fields(group) if field.name in left]:
        try:
            values[name] = TypeAdapter(types[name], config=_YAML).validate_python(left.pop(name))
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors()[0]['msg']}") from error
    return group(**values)

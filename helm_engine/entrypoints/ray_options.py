"""The flags of a server whose engines are replicas of Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from helm_engine.config import EngineConfig, FleetConfig, ServerConfig

_PANEL = "Ray"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What the command line says about Ray."""

    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            rich_help_panel=_PANEL,
            help="Run the engines as replicas of Ray Serve (extra ray), on a Ray of this command's "
            "own unless --ray-address names another.",
        ),
    ] = False
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=_PANEL,
            help="A Ray cluster that is there already, host:port or auto.",
        ),
    ] = None
    ray_cpus: Annotated[
        int | None,
        typer.Option(
            metavar="CORES",
            min=1,
            rich_help_panel=_PANEL,
            help="Cores of each engine; default: those of this machine shared evenly.",
        ),
    ] = None
    ray_fronts: Annotated[
        int,
        typer.Option(
            metavar="FRONTS",
            min=1,
            rich_help_panel=_PANEL,
            help="Processes that speak HTTP and route; each learns what engines hold by itself.",
        ),
    ] = 1

    def check(self, config: EngineConfig, server: ServerConfig) -> None:
        """Refuses what does not go with Ray.

        Raises:
            ValueError: names the field.
        """
        if not self.ray:
            if self != RayOptions():
                raise ValueError("ray_address, ray_cpus and ray_fronts: need --ray")
            return
        fleet, defaults = server.fleet, FleetConfig()
        residency = config.residency
        for field, is_given, reason in (
            ("engine", bool(fleet.remote), "Ray's replicas are the engines"),
            ("num_engines", fleet.num_engines < 1, "must be at least 1"),
            ("hedge_ms", fleet.hedge_ms is not None, "requests go to one replica at a time"),
            (
                "suspect_timeout",
                fleet.suspect_timeout != defaults.suspect_timeout,
                "Ray Serve checks the replicas",
            ),
            ("kv_events_endpoint", residency.endpoint is not None, "replicas have their own"),
            ("engine_name", residency.engine_name is not None, "replicas have names of their own"),
            ("record_trace", server.record_trace is not None, "fronts may run on any node"),
            (
                "decision_log",
                config.controller.decision_log is not None,
                "replicas may run on any node",
            ),
        ):
            if is_given:
                raise ValueError(f"{field}: does not go with --ray: {reason}")
        if config.executor.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device: {config.executor.device!r} does not go with --ray, which gives each "
                "replica a GPU of its own: say cuda"
            )

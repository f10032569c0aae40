"""The flags of commands that run engines on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from helm_engine.config import EngineConfig, FleetConfig, ServerConfig

PANEL = "Ray"
_ANYWHERE = "who would write the file may run on any node"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What the command line says about Ray."""

    ray: Annotated[
        bool,
        typer.Option(
            rich_help_panel=PANEL,
            help="Run the engines on Ray (extra ray), one of this command's own unless "
            "--ray-address names another.",
        ),
    ] = False
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=PANEL,
            help="A Ray cluster that is there already, host:port or auto.",
        ),
    ] = None
    ray_cpus: Annotated[
        int | None,
        typer.Option(
            metavar="CORES",
            min=1,
            rich_help_panel=PANEL,
            help="Cores of each engine; default: those of this machine shared evenly, or one with "
            "--ray-address.",
        ),
    ] = None

    def cpus_each(self, num_engines: int) -> int:
        """Cores of each of so many engines; on another's Ray one, unless it was said."""
        if self.ray_cpus is not None:
            return self.ray_cpus
        if self.ray_address is not None:
            return 1
        # Loaded here: `--help` must not wait for torch.
        from helm_engine.fleet_members import num_cores

        return max(1, num_cores() // num_engines)

    def check(self, config: EngineConfig) -> None:
        """Refuses what does not go with Ray, or without it.

        Raises:
            ValueError: names the field.
        """
        if not self.ray:
            if self != RayOptions():
                raise ValueError("ray_address and ray_cpus: need --ray")
            return
        if config.executor.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device: {config.executor.device!r} does not go with --ray, which gives each "
                "engine a GPU of its own: say cuda"
            )
        _refuse("decision_log", config.controller.decision_log is not None, _ANYWHERE)

    def check_server(self, config: EngineConfig, server: ServerConfig) -> None:
        """Likewise for a server.

        Raises:
            ValueError: names the field.
        """
        self.check(config)
        fleet, residency = server.fleet, config.residency
        if not self.ray:
            if fleet.num_fronts > 1:
                raise ValueError("num_fronts: needs --ray")
            return
        for field, is_given, reason in (
            ("engine", bool(fleet.remote), "its replicas are the engines"),
            ("num_engines", fleet.num_engines < 1, "there must be one at least"),
            ("hedge_ms", fleet.hedge_ms is not None, "a request goes to one replica at a time"),
            (
                "suspect_timeout",
                fleet.suspect_timeout != FleetConfig().suspect_timeout,
                "Ray Serve checks the replicas",
            ),
            ("kv_events_endpoint", residency.endpoint is not None, "replicas have their own"),
            ("engine_name", residency.engine_name is not None, "replicas have their own"),
            ("record_trace", server.record_trace is not None, _ANYWHERE),
        ):
            _refuse(field, is_given, reason)


@contextmanager
def needs_ray() -> Iterator[None]:
    """Says how to install Ray where an import within it fails for want of it.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "pyarrow", "pandas"):
            raise
        raise ValueError("ray: needs Ray: pip install 'helm-engine[ray]' brings it") from error


def _refuse(field: str, is_given: bool, reason: str) -> None:
    if is_given:
        raise ValueError(f"{field}: does not go with --ray: {reason}")

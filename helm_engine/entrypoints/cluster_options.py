"""Flags of `simulate` that put many engines behind routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helm_engine.entrypoints.command import CommandError

if TYPE_CHECKING:
    from helm_engine.simulator.cluster import ClusterModel
    from helm_engine.simulator.simulation import EngineModel


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """How many engines there are, and who sends them requests."""

    engines: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Route over so many engines (docs/cluster.md); a workload's load is that of each.",
        ),
    ] = None
    routing_policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="joint (default), kv, emb, least_load, consistent_hash or round_robin.",
        ),
    ] = None
    routers: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Routers that share the requests.")
    ] = None
    staleness: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="SECONDS", help="Age of what routers know of engines; 0.1 by default."
        ),
    ] = None
    emb_spread: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="WIDTH",
            help="Engines begin at shares spread so widely around --emb-fraction.",
        ),
    ] = None

    def check(self) -> None:
        """Looks before anything is loaded.

        Raises:
            CommandError: names the flag.
        """
        flags = {
            "--routing-policy": self.routing_policy,
            "--routers": self.routers,
            "--staleness": self.staleness,
            "--emb-spread": self.emb_spread,
        }
        for flag in (flag for flag, value in flags.items() if value is not None):
            if self.engines is None:
                raise CommandError(f"{flag}: nobody routes to a single engine; give --engines too")

    def model(self, engine: EngineModel, emb_fraction: float, seed: int) -> ClusterModel:
        """The engines and routers that are asked for.

        Raises:
            ValueError: a share is not within 0..1, or there is no such policy.
        """
        from helm_engine.simulator.cluster import ClusterModel, spread_fractions

        assert self.engines is not None
        given: dict[str, Any] = {
            "policy": self.routing_policy,
            "routers": self.routers,
            "staleness_s": self.staleness,
        }
        return ClusterModel(
            engine,
            spread_fractions(self.engines, emb_fraction, self.emb_spread or 0.0),
            seed=seed,
            **{name: value for name, value in given.items() if value is not None},
        )

    def as_json(self, model: ClusterModel) -> dict[str, Any]:
        """How requests were routed."""
        return {
            "policy": model.policy,
            "routers": model.routers,
            "staleness_s": model.staleness_s,
            "emb_fractions_at_start": list(model.emb_fractions),
        }

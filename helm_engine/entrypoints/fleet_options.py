"""The flags that say which engines stand behind a front and how one of them is chosen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from helm_engine.config import FleetConfig

_PANEL = "Several engines"
_DEFAULTS = FleetConfig()
_MIN_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What the command line says about a fleet."""

    num_engines: Annotated[
        int,
        typer.Option(
            metavar="ENGINES",
            min=0,
            rich_help_panel=_PANEL,
            help="Engine cores to run here, each with a pool of --pool-bytes.",
        ),
    ] = _DEFAULTS.num_engines
    num_fronts: Annotated[
        int,
        typer.Option(
            metavar="FRONTS",
            min=1,
            rich_help_panel=_PANEL,
            help="With --ray: processes that speak HTTP and route, each with an index of its own.",
        ),
    ] = _DEFAULTS.num_fronts
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=_PANEL,
            help="An engine of another host, tcp://host:port (`helm-engine engine`); may be "
            "given several times.",
        ),
    ] = None
    user_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="At least 16 secret bytes that key the hashes of users: the same for all fronts "
            "of an engine.",
        ),
    ] = None
    routing_policy: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_PANEL,
            help="Which engine gets a request: joint, kv, emb, least_load, round_robin or "
            "consistent_hash.",
        ),
    ] = _DEFAULTS.policy
    hedge_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            rich_help_panel=_PANEL,
            help="Give a request that has no answer after so long to a second engine too; "
            "default: never.",
        ),
    ] = _DEFAULTS.hedge_ms
    suspect_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            rich_help_panel=_PANEL,
            help="An engine whose process shows no life for so long gets no requests, and others "
            "take over those that it has.",
        ),
    ] = _DEFAULTS.suspect_timeout

    def resolve(self) -> FleetConfig:
        """Builds the configuration and reads the key.

        Raises:
            ValueError: names the field.
        """
        return FleetConfig(
            num_engines=self.num_engines,
            num_fronts=self.num_fronts,
            remote=tuple(self.engine or ()),
            policy=self.routing_policy,
            hedge_ms=self.hedge_ms,
            suspect_timeout=self.suspect_timeout,
            user_key=None if self.user_key_file is None else _read_user_key(self.user_key_file),
        )


def _read_user_key(path: Path) -> bytes:
    """A key of 32 bytes, made of all that is in a file; blank space around it does not count.

    Raises:
        ValueError: it cannot be read, or holds too little.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"user_key_file: {path}: {error.strerror}") from error
    if len(secret) < _MIN_KEY_BYTES:
        raise ValueError(
            f"user_key_file: {path} holds {len(secret)} bytes, must hold at least {_MIN_KEY_BYTES}"
        )
    return hashlib.sha256(secret).digest()

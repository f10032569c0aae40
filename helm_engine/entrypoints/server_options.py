"""The flags of the HTTP front."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from helm_engine.config import ServerConfig
from helm_engine.entrypoints.api_keys import KeySet, read_key_file
from helm_engine.entrypoints.sizes import size_in_bytes
from helm_engine.entrypoints.value_source import secret_option

_SERVER, _TRACE, _KEYS = "Server", "Recorded trace", "Keys"
_DEFAULTS = ServerConfig()


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command line says about a front."""

    host: Annotated[
        str, typer.Option(metavar="ADDRESS", rich_help_panel=_SERVER, help="Address to listen on.")
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            metavar="PORT", min=0, max=65535, rich_help_panel=_SERVER, help="0 picks a free port."
        ),
    ] = 8000
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            rich_help_panel=_SERVER,
            help="Time that requests in flight have after SIGTERM.",
        ),
    ] = _DEFAULTS.shutdown_timeout
    hang_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            rich_help_panel=_SERVER,
            help="An engine that is silent for so long is killed and started anew; longer than "
            "any step takes.",
        ),
    ] = _DEFAULTS.hang_timeout
    start_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            rich_help_panel=_SERVER,
            help="An engine that is not loaded and warm by then is given up.",
        ),
    ] = _DEFAULTS.start_timeout
    body_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            rich_help_panel=_SERVER,
            help="Time that a client has to send a body; then it gets 408.",
        ),
    ] = _DEFAULTS.body_timeout
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=_SERVER,
            help="Where OpenTelemetry spans are sent, such as http://localhost:4318/v1/traces "
            "(extra otel).",
        ),
    ] = None
    record_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_TRACE,
            help="Record each request in a new file, for `simulate` and `plan`; ids are hashed "
            "with a key that is not kept.",
        ),
    ] = None
    record_trace_max_bytes: Annotated[
        str,
        typer.Option(
            metavar="SIZE", rich_help_panel=_TRACE, help="Where that file ends; the server goes on."
        ),
    ] = f"{_DEFAULTS.record_trace_max_bytes >> 20}MiB"
    api_key: Annotated[
        str | None,
        secret_option(
            "Keys that let a client ask, with commas between them. Whoever lists processes sees "
            "a flag: prefer the variable or a file.",
            metavar="KEY",
            rich_help_panel=_KEYS,
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_KEYS, help="More such keys, one a line; # comments."
        ),
    ] = None
    admin_key: Annotated[
        str | None,
        secret_option(
            "Keys that let an operator reload the model, likewise.",
            metavar="KEY",
            rich_help_panel=_KEYS,
        ),
    ] = None
    admin_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_KEYS, help="More such keys, one a line."),
    ] = None

    def resolve(self) -> ServerConfig:
        """Builds the configuration and reads the key files.

        Raises:
            ValueError: names the field.
        """
        return ServerConfig(
            shutdown_timeout=self.shutdown_timeout,
            hang_timeout=self.hang_timeout,
            start_timeout=self.start_timeout,
            body_timeout=self.body_timeout,
            api_keys=_keys("api_key", self.api_key, self.api_key_file),
            admin_keys=_keys("admin_key", self.admin_key, self.admin_key_file),
            otlp_traces_endpoint=self.otlp_traces_endpoint,
            record_trace=self.record_trace,
            record_trace_max_bytes=size_in_bytes(
                "record_trace_max_bytes", self.record_trace_max_bytes
            ),
        )


def _keys(name: str, sent: str | None, file: Path | None) -> tuple[str, ...]:
    """The keys of a flag and of its file, each of them well formed."""
    variable = f"HELM_{name.upper()}"
    if sent is None and os.environ.get(variable) == "":
        # A secret that came out empty must not open the server to everybody.
        raise ValueError(f"{variable}: is set but empty; unset it to serve without keys")
    keys = [key.strip() for key in sent.split(",")] if sent is not None else []
    source = name
    try:
        KeySet(keys)
        if file is not None:
            source = f"{name}_file"
            keys += read_key_file(file)
            KeySet(keys)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return tuple(keys)

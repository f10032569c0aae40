"""`helm-engine publish-rows`: puts a model's tables into the parameter server of its engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskProgressColumn

from helm_engine.config import HostTierConfig
from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.waiting import progress_bar

EXAMPLES = """
\b
Examples:
  helm-engine publish-rows MODEL_DIR redis://rows:6379/0
  HELM_HOST_TIER=redis://:PASSWORD@rows:6379/0 helm-engine publish-rows MODEL_DIR

\b
Run again it writes the same again. Engines find the tables once all rows are there.
"""


def publish_rows(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            envvar="HELM_MODEL",
            help="Directory with config.json and safetensors.",
        ),
    ],
    server: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            envvar="HELM_HOST_TIER",
            help="redis://[user:password@]host:port/db. Whoever lists processes sees an argument: "
            "with a password prefer the variable.",
        ),
    ],
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            help="Time to connect, and time that the server may leave a command unanswered.",
        ),
    ] = 10.0,
) -> None:
    """Put a model's tables into a parameter server."""
    try:
        address = HostTierConfig(server).redis_address
    except ValueError as error:
        raise CommandError(str(error).replace("host_tier", "URL", 1)) from error
    if address is None:
        raise CommandError("URL: mmap needs no publishing; name a server, redis://host:port/db")
    try:
        from model_executor.redis_publish import PublishError, publish_tables
    except ModuleNotFoundError as error:
        raise CommandError("URL: needs redis-py: pip install 'helm-engine[redis]'") from error
    from model_executor.checkpoint import load_config, map_tables, tables_version
    from model_executor.redis_layout import tables_of

    try:
        config = load_config(model)
        tables = map_tables(model, config)
        published = tables_of(config, tables_version(model))
        with progress_bar(TaskProgressColumn()) as progress:

            def watch(table: str, rows: int) -> Callable[[int], None]:
                return partial(progress.advance, progress.add_task(table, total=rows))

            publish_tables(address, published, tables, timeout, watch)
    except (ValueError, PublishError) as error:
        raise CommandError(str(error)) from error
    rows = sum(published.num_rows.values())
    print(f"{address} holds {rows} rows of {model}, version {published.version[:12]}")

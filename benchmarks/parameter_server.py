"""A model's rows in a Redis of one's own, behind a link of stated speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.redis_server import running_redis
from benchmarks.slow_link import slow_link
from model_executor.checkpoint import load_config, map_tables, tables_version
from model_executor.redis_address import parse_redis_url
from model_executor.redis_layout import PublishedTables, tables_of
from model_executor.redis_publish import publish_tables
from model_executor.redis_store import RedisTables


@dataclass(frozen=True, slots=True)
class ParameterServer:
    """Rows that can be read."""

    url: str
    """Of the far end of the link: what `--host-tier` takes."""
    redis_pid: int
    link_pid: int
    _tables: PublishedTables

    def store(self, timeout_s: float) -> RedisTables:
        """The rows as a host store of this process; a read may take so many seconds."""
        return RedisTables(parse_redis_url(self.url), self._tables, timeout_s)


@contextmanager
def rows_behind_link(
    model_dir: Path, round_trip_ms: float, bytes_per_second: float
) -> Iterator[ParameterServer]:
    """Publishes a model's rows; the link is only between them and who reads.

    Args:
        model_dir: whose tables.
        round_trip_ms: of the link.
        bytes_per_second: likewise, each way.
    """
    model = load_config(model_dir)
    published = tables_of(model, tables_version(model_dir))
    with (
        running_redis() as server,
        slow_link(server.port, round_trip_ms, bytes_per_second) as link,
    ):
        near = parse_redis_url(server.url)
        tables = map_tables(model_dir, model)
        publish_tables(near, published, tables, 30.0, lambda *_: lambda _: None)
        url = f"redis://127.0.0.1:{link.port}/0"
        yield ParameterServer(url, server.pid, link.pid, published)

"""Puts a model's tables into a parameter server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import redis

from model_executor.redis_address import RedisAddress
from model_executor.redis_layout import (
    MAX_ROWS,
    PUBLISHED_KEY,
    PublishedTables,
    connection_settings,
    row_fields,
    row_values,
    rows_key,
)

_BYTES_PER_COMMAND = 1 << 20
_COMMANDS_PER_EXCHANGE = 8
"""So that a long round trip costs little, and neither side holds much at once."""


class PublishError(RuntimeError):
    """The tables could not be published; what is there is not served."""


def publish_tables(
    address: RedisAddress,
    published: PublishedTables,
    tables: Sequence[npt.NDArray[np.float32]],
    timeout_s: float,
    watch: Callable[[str, int], Callable[[int], None]],
) -> None:
    """Writes all rows, counts them, and only then says that the tables are there.

    Run again it writes the same again, which mends tables that have lost rows. Engines that read
    the tables meanwhile are not disturbed, since a version's rows never change.

    Args:
        address: of the server.
        published: what `tables` are.
        tables: float32 [rows, D] each, in the order of `published.num_rows`.
        timeout_s: seconds to connect, and seconds without an answer, before it is given up.
        watch: called with a table's name and rows; what it returns is called with the number of
            rows written, again and again.

    Raises:
        PublishError: the server is not there, refuses a command or has no memory left.
    """
    try:
        with redis.Redis(**connection_settings(address, timeout_s)) as client:
            for name, table in zip(published.num_rows, tables, strict=True):
                _write(client, rows_key(published.version, name), table, watch(name, len(table)))
            client.hset(PUBLISHED_KEY, published.version, msgspec.json.encode(published))
    except redis.TimeoutError as error:
        raise PublishError(
            f"the parameter server at {address} did not answer within {timeout_s:g} s"
        ) from error
    except redis.RedisError as error:
        raise PublishError(f"the parameter server at {address}: {error}") from error


def _write(
    client: Any, key: str, table: npt.NDArray[np.float32], advance: Callable[[int], None]
) -> None:
    if len(table) > MAX_ROWS:
        raise PublishError(f"{key}: has {len(table)} rows, the limit is {MAX_ROWS}")
    step = max(1, _BYTES_PER_COMMAND // (4 * table.shape[1]))
    exchange = step * _COMMANDS_PER_EXCHANGE
    for begin in range(0, len(table), exchange):
        end = min(begin + exchange, len(table))
        with client.pipeline(transaction=False) as pipeline:
            for first in range(begin, end, step):
                ids = np.arange(first, min(first + step, end), dtype=np.int64)
                arguments: list[bytes] = [b""] * (2 * len(ids))
                arguments[0::2] = row_fields(ids)
                arguments[1::2] = row_values(table[first : first + len(ids)])
                pipeline.execute_command("HSET", key, *arguments)
            pipeline.execute()
        advance(end - begin)
    count = client.hlen(key)
    if count != len(table):
        raise PublishError(f"{key}: holds {count} rows of {len(table)} after all were written")

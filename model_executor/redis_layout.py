"""How tables lie in a parameter server.

helm:published            hash: digest of the tables -> JSON of `PublishedTables`, written last
helm:DIGEST:TABLE         hash: row id in the table (uint32, little-endian) -> the row's bytes

One hash for each table, read with HMGET. `benchmarks/row_layouts.py` reads random batches of 64 to
8,192 rows of 256 and 2,048 bytes in five ways: MGET over one string key for each row takes about as
long (0.7 to 1.2 times, on a busy machine), pipelined GETRANGE over large strings 1.4 to 3.9 times
(a command for each row), a script on the server 1.3 to 8.7 times. A hash takes the least memory for
each row, none of its values comes near the 512 MB that a string may have, a row is replaced by one
HSET, and a model's tables go with one UNLINK each.

The digest is in every key: a new model never reads the rows of another.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
from redis.backoff import NoBackoff
from redis.retry import Retry

from model_executor.model_config import ModelConfig
from model_executor.redis_address import RedisAddress

PUBLISHED_KEY = "helm:published"
LAYOUT = 1
"""Changes when keys or values change their form."""
MAX_ROWS = 1 << 32
"""Rows of a table that its ids can name, and that a hash can hold."""


class PublishedTables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a parameter server says of the tables it holds."""

    layout: int
    version: str
    """Digest of the tables, hex."""
    dtype: str
    """Of a row's values, as NumPy names it."""
    row_bytes: int
    num_rows: dict[str, int]
    """Of each table, by name."""


def tables_of(config: ModelConfig, version: str) -> PublishedTables:
    """What a parameter server must say of a model's tables, whose digest is `version`."""
    num_rows = {table.name: table.num_rows for table in config.row_tables}
    return PublishedTables(LAYOUT, version, "float32", 4 * config.row_dim, num_rows)


def rows_key(version: str, table: str) -> str:
    """The key of a table's rows."""
    return f"helm:{version}:{table}"


def row_fields(row_ids: npt.NDArray[np.int64]) -> list[bytes]:
    """The fields of rows of a table, int64 [n] from 0 on."""
    return _as_bytes(row_ids.astype("<u4"), 4)


def row_values(rows: npt.NDArray[np.float32]) -> list[bytes]:
    """The values of rows, float32 [n, D]."""
    return _as_bytes(np.ascontiguousarray(rows, dtype="<f4"), 4 * rows.shape[1])


def _as_bytes(array: npt.NDArray[Any], width: int) -> list[bytes]:
    """Each `width` bytes of a contiguous array, cut without a Python loop."""
    return cast(list[bytes], array.reshape(-1).view(f"V{width}").tolist())


def connection_settings(address: RedisAddress, timeout_s: float) -> dict[str, Any]:
    """Arguments of `redis.Redis`: no retries of its own, and no wait longer than the time-out."""
    return {
        "host": address.host,
        "port": address.port,
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "socket_connect_timeout": timeout_s,
        "socket_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }

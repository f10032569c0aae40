"""The host tier as a parameter server: rows of the tables that were published to a Redis.

A read is one round trip: HMGET of up to 2,048 rows each, pipelined. A server that is gone, or
silent for the time-out, makes reads fail by name. After a failure reads fail at once, without
asking, for a pause that doubles up to a second; the first one after it asks again, so that the
engine goes on by itself once the server is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import redis

from model_executor.exceptions import RowsUnavailableError, TablesMismatchError
from model_executor.redis_address import RedisAddress
from model_executor.redis_layout import (
    PUBLISHED_KEY,
    PublishedTables,
    connection_settings,
    row_fields,
    rows_key,
)

logger = logging.getLogger(__name__)

_ROWS_PER_COMMAND = 2048
"""Redis does one command at a time: a longer one would hold up a demand miss behind it."""
_COMMANDS_PER_EXCHANGE = 16
"""Bounds what the server buffers for us when many rows are read, as at the start."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""How long an engine may take to see that its parameter server is back."""


_Part = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""What a command reads: the table, the rows' places in the answer, and their ids in the table."""


class _Outage:
    """Whether the server is worth asking; shared by the threads that read."""

    def __init__(self, address: RedisAddress, clock: Callable[[], float]) -> None:
        self._address = address
        self._clock = clock
        self._lock = threading.Lock()
        self._pause = 0.0
        self._ask_again_at = 0.0
        self._reason = ""

    def refuse_early(self) -> None:
        """Raises RowsUnavailableError while a pause lasts."""
        with self._lock:
            if self._pause and self._clock() < self._ask_again_at:
                raise RowsUnavailableError(self._reason)

    def failed(self, what: str) -> RowsUnavailableError:
        """Begins a pause; returns the error of the read that failed, and of those in the pause."""
        with self._lock:
            self._reason = f"the parameter server at {self._address} {what}"
            self._pause = min(_LONGEST_PAUSE_S, 2 * self._pause or _FIRST_PAUSE_S)
            self._ask_again_at = self._clock() + self._pause
            return RowsUnavailableError(self._reason)

    def over(self) -> None:
        """An answer came."""
        with self._lock:
            self._pause = 0.0


class RedisTables:
    """Rows of published tables, through redis-py; may be read by several threads at once."""

    def __init__(
        self,
        address: RedisAddress,
        tables: PublishedTables,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects, and checks that the server holds the tables.

        Args:
            address: of the server.
            tables: what the model needs.
            timeout_s: seconds to connect, and seconds without an answer, before a read fails.
            clock: seconds, for the pauses after failures.

        Raises:
            RowsUnavailableError: the server is not there.
            TablesMismatchError: it holds other tables, or only a part; names the field.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._row_bytes = tables.row_bytes
        self._keys = [rows_key(tables.version, name) for name in tables.num_rows]
        self._ends = np.cumsum(list(tables.num_rows.values()))
        self._outage = _Outage(address, clock)
        self._lacks_rows = False
        self._client = redis.Redis(**connection_settings(address, timeout_s))
        try:
            self._check(tables)
        except BaseException:
            self.close()
            raise

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return int(self._ends[-1])

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Copies of rows (int64 [n], each within the tables): float32 [n, D].

        Raises:
            RowsUnavailableError: the server cannot be reached or does not answer in time, or rows
                are missing; names the server, or the key and the count.
        """
        parts = self._parts(row_ids)
        try:
            rows = self._read(parts, len(row_ids))
        except RowsUnavailableError as error:
            if not self._lacks_rows:
                logger.warning("%s; requests that need its rows fail", error)
            self._lacks_rows = True
            raise
        if self._lacks_rows:
            logger.warning("the parameter server at %s delivers rows again", self._address)
        self._lacks_rows = False
        return rows

    def _read(self, parts: list[_Part], number: int) -> npt.NDArray[np.float32]:
        rows = np.empty((number, self._row_bytes // 4), dtype=np.float32)
        for first in range(0, len(parts), _COMMANDS_PER_EXCHANGE):
            some = parts[first : first + _COMMANDS_PER_EXCHANGE]
            replies = self._ask(
                [("HMGET", self._keys[table], *row_fields(own)) for table, _, own in some]
            )
            for (table, places, own), values in zip(some, replies, strict=True):
                rows[places] = self._decoded(self._keys[table], own, values)
        return rows

    def _parts(self, row_ids: npt.NDArray[np.int64]) -> list[_Part]:
        owners = np.searchsorted(self._ends, row_ids, side="right")
        parts: list[_Part] = []
        for table in np.unique(owners).tolist():
            if table == len(self._ends):
                raise IndexError(f"row {row_ids.max()} is beyond the last table's end")
            places = np.flatnonzero(owners == table)
            begin = self._ends[table - 1] if table else 0
            for first in range(0, len(places), _ROWS_PER_COMMAND):
                own = places[first : first + _ROWS_PER_COMMAND]
                parts.append((table, own, row_ids[own] - begin))
        return parts

    def _decoded(
        self, key: str, row_ids: npt.NDArray[np.int64], values: list[bytes | None]
    ) -> npt.NDArray[np.float32]:
        missing = values.count(None)
        if missing:
            raise RowsUnavailableError(
                f"{missing} of {len(values)} rows are missing from {key} of the parameter server "
                f"at {self._address} (row {row_ids[values.index(None)]} first); publish them again"
            )
        found = cast(list[bytes], values)
        if set(map(len, found)) != {self._row_bytes}:
            raise RowsUnavailableError(
                f"rows of {key} of the parameter server at {self._address} are not all of "
                f"{self._row_bytes} bytes; publish them again"
            )
        return np.frombuffer(b"".join(found), dtype="<f4").reshape(len(found), -1)

    def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The replies to commands, which travel together."""
        self._outage.refuse_early()
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                replies = pipeline.execute()
        except redis.TimeoutError as error:
            raise self._outage.failed(f"did not answer within {self._timeout_s:g} s") from error
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise self._outage.failed(f"refuses the user or the password: {error}") from error
        except redis.exceptions.BusyLoadingError as error:
            raise self._outage.failed("is loading its data") from error
        except redis.ConnectionError as error:
            raise self._outage.failed(f"cannot be reached: {error}") from error
        except redis.RedisError as error:
            raise self._outage.failed(f"answered: {error}") from error
        self._outage.over()
        return replies

    def _check(self, wanted: PublishedTables) -> None:
        """Holds what the server says of its tables, and the number of rows, against the model."""
        text, versions, *counts = self._ask(
            [
                ("HGET", PUBLISHED_KEY, wanted.version),
                ("HKEYS", PUBLISHED_KEY),
                *(("HLEN", key) for key in self._keys),
            ]
        )
        where = f"the parameter server at {self._address}"
        if text is None:
            others = ", ".join(sorted(one.decode(errors="replace")[:12] for one in versions))
            raise TablesMismatchError(
                f"version: {where} does not hold the model's tables, {wanted.version[:12]} (it "
                f"holds {others or 'none'}); `helm-engine publish-rows` puts them there"
            )
        try:
            found = msgspec.json.decode(text, type=PublishedTables)
        except msgspec.DecodeError as error:
            raise TablesMismatchError(f"{PUBLISHED_KEY} of {where}: {error}") from error
        for field in PublishedTables.__struct_fields__:
            published, needed = getattr(found, field), getattr(wanted, field)
            if published != needed:
                raise TablesMismatchError(
                    f"{field}: {where} says {published!r}, the model needs {needed!r}"
                )
        for key, (name, needed), count in zip(
            self._keys, wanted.num_rows.items(), counts, strict=True
        ):
            if count != needed:
                raise TablesMismatchError(
                    f"num_rows: {key} of {where} holds {count} rows, table {name!r} has {needed}; "
                    "publish them again"
                )

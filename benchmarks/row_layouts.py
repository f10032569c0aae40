"""Ways to lay rows out in Redis, by the time that a batch of random rows takes to read.

All five read the same rows of the same server in turns, through redis-py with hiredis, and return
the same bytes. `hmget` is what the engine does (model_executor/redis_layout.py). Medians of all
seeds, and how long the others take for each millisecond of `hmget`; memory is what the server's
books grew by for each row.

    python benchmarks/row_layouts.py --json benchmarks/results/row_layouts.json --seeds 1,2,3
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import numpy.typing as npt
from rich.progress import track

from benchmarks.redis_server import RedisServer, running_redis
from benchmarks.report import benchmark_parser, write_result
from model_executor.redis_layout import row_fields, row_values

Int64Array = npt.NDArray[np.int64]

NUM_ROWS = 100_000
WIDTHS = (64, 512)
"""Floats of a row: 256 and 2,048 bytes."""
BATCHES = (64, 512, 2048, 8192)
ROWS_PER_STRING = 1 << 16
PREFIX = b"helm:0123456789abcdef:items:"
WRITTEN_AT_ONCE = 5000

_OF_STRINGS = """
local ids, width, out = ARGV[1], tonumber(ARGV[2]), {}
for place = 1, #ids, 4 do
  local a, b, c, d = string.byte(ids, place, place + 3)
  local row = a + 256 * b + 65536 * c + 16777216 * d
  local first = (row % 65536) * width
  local key = KEYS[1] .. math.floor(row / 65536)
  out[#out + 1] = redis.call('GETRANGE', key, first, first + width - 1)
end
return table.concat(out)
"""
_OF_HASH = """
local ids, fields, out = ARGV[1], {}, {}
for place = 1, #ids, 4 do fields[#fields + 1] = string.sub(ids, place, place + 3) end
for first = 1, #fields, 4000 do
  local last = math.min(first + 3999, #fields)
  out[#out + 1] = table.concat(redis.call('HMGET', KEYS[1], unpack(fields, first, last)))
end
return table.concat(out)
"""


def row_keys(row_ids: Int64Array) -> list[bytes]:
    """One string key for each row, cut without a Python loop."""
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    keys = np.empty((len(row_ids), len(PREFIX) + 8), dtype=np.uint8)
    keys[:, : len(PREFIX)] = np.frombuffer(PREFIX, dtype=np.uint8)
    for place in range(8):
        keys[:, len(PREFIX) + place] = digits[(row_ids >> (4 * (7 - place))) & 15]
    found: list[bytes] = keys.reshape(-1).view(f"V{keys.shape[1]}").tolist()
    return found


def write(client: Any, table: npt.NDArray[np.float32]) -> dict[str, float]:
    """Writes a table in all layouts; the server's bytes for each row by layout."""
    used: dict[str, float] = {}

    def measured(name: str, write_all: Callable[[], None]) -> None:
        before = client.info("memory")["used_memory"]
        write_all()
        used[name] = (client.info("memory")["used_memory"] - before) / len(table)

    def keys() -> None:
        for first in range(0, len(table), WRITTEN_AT_ONCE):
            ids = np.arange(first, first + WRITTEN_AT_ONCE)
            client.mset(dict(zip(row_keys(ids), row_values(table[ids]), strict=True)))

    def fields() -> None:
        for first in range(0, len(table), WRITTEN_AT_ONCE):
            ids = np.arange(first, first + WRITTEN_AT_ONCE)
            pairs = zip(row_fields(ids), row_values(table[ids]), strict=True)
            client.hset("hash", mapping=dict(pairs))

    def strings() -> None:
        for number, first in enumerate(range(0, len(table), ROWS_PER_STRING)):
            client.set(f"string{number}", table[first : first + ROWS_PER_STRING].tobytes())

    measured("string key for each row", keys)
    measured("hash", fields)
    measured("large strings", strings)
    return used


def readers(client: Any, row_bytes: int) -> dict[str, Callable[[Int64Array], bytes]]:
    """What reads rows out of each layout."""
    of_strings, of_hash = client.register_script(_OF_STRINGS), client.register_script(_OF_HASH)

    def getrange(ids: Int64Array) -> bytes:
        with client.pipeline(transaction=False) as pipeline:
            for row in ids.tolist():
                string, place = divmod(row, ROWS_PER_STRING)
                first = place * row_bytes
                pipeline.execute_command(
                    "GETRANGE", f"string{string}", first, first + row_bytes - 1
                )
            return b"".join(pipeline.execute())

    def packed(ids: Int64Array) -> bytes:
        return ids.astype("<u4").tobytes()

    return {
        "hmget": lambda ids: b"".join(client.execute_command("HMGET", "hash", *row_fields(ids))),
        "mget": lambda ids: b"".join(client.execute_command("MGET", *row_keys(ids))),
        "getrange": getrange,
        "script over strings": lambda ids: of_strings(["string"], [packed(ids), row_bytes]),
        "script over a hash": lambda ids: of_hash(["hash"], [packed(ids)]),
    }


def cell(client: Any, width: int, seeds: list[int], repeats: int) -> dict[str, Any]:
    """All layouts and batches of one width."""
    client.flushall()
    table = np.random.default_rng(0).standard_normal((NUM_ROWS, width)).astype("<f4")
    memory, ways = write(client, table), readers(client, 4 * width)
    batches: dict[str, Any] = {}
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for seed in seeds:
            generator = np.random.default_rng(seed)
            for _ in range(repeats):
                ids = generator.integers(0, NUM_ROWS, batch)
                for name, read in ways.items():
                    begun = time.perf_counter()
                    found = read(ids)
                    times[name].append((time.perf_counter() - begun) * 1e3)
                    if found != table[ids].tobytes():
                        raise RuntimeError(f"{name} read other rows")
        medians = {name: float(np.median(found)) for name, found in times.items()}
        batches[str(batch)] = {
            "ms": medians,
            "times_hmget": {name: ms / medians["hmget"] for name, ms in medians.items()},
        }
    return {"server_bytes_per_row": memory, "batches": batches}


def measure(server: RedisServer, seeds: list[int], repeats: int) -> dict[str, Any]:
    """All cells."""
    with server.client() as client:
        return {
            f"{4 * width} bytes": cell(client, width, seeds, repeats)
            for width in track(WIDTHS, "widths")
        }


def main() -> None:
    """Entry point."""
    arguments = benchmark_parser(__doc__).parse_args()
    repeats = 3 if arguments.quick else 20
    with running_redis() as server:
        cells = measure(server, arguments.seeds, repeats)
        with server.client() as client:
            redis_version = client.info("server")["redis_version"]
    figures = {"redis_version": redis_version, "repeats": repeats, "rows": NUM_ROWS, **cells}
    write_result(arguments.json, figures, arguments.seeds)


if __name__ == "__main__":
    main()

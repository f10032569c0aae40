"""Sends recorded requests to a server at their times, from a process of its own.

The arrivals are an open loop: a request is due when the recording says, and its latency counts from
then, however late it was sent or answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

import aiohttp
import numpy as np
import numpy.typing as npt

from benchmarks.cpu_use import CpuUse
from helm_engine.bench.load import Outcome as Answered
from helm_engine.bench.load import open_loop

_CLIENT_SECONDS = 60.0
_OK = "200"

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Replay:
    """Requests to send."""

    address: str
    arrivals: Sequence[float]
    """Seconds after the start, ascending."""
    bodies: Sequence[bytes]
    """JSON of each."""
    processes: Mapping[str, Sequence[int]]
    """Ids by role, whose use of the processors is watched beside the client's own."""


@dataclass(slots=True)
class Outcome:
    """What became of them, one entry per request."""

    began: float
    """When the replay did, on the machine's monotonic clock, seconds."""
    latencies_ms: list[float] = field(default_factory=list)
    """From when each was due to the last byte of its answer; NaN where it failed."""
    late_ms: list[float] = field(default_factory=list)
    """By which each was sent too late: the client's own fault."""
    statuses: list[str] = field(default_factory=list)
    usage: list[dict[str, int]] = field(default_factory=list)
    """What the server says of hits; empty where a request failed."""
    scores: list[Float32Array | None] = field(default_factory=list)
    """Of the candidates, in the order of their ids; None where a request failed."""
    cpu_shares: dict[str, float] = field(default_factory=dict)
    """See `CpuUse.shares`."""


def replay(wanted: Replay) -> Outcome:
    """Sends everything and waits for the last answer."""
    return asyncio.run(_replay(wanted))


async def _replay(wanted: Replay) -> Outcome:
    answers: dict[float, bytes] = {}
    # No limit: a client that waits for a free connection would not be an open loop.
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_CLIENT_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers={"Content-Type": "application/json"}
    ) as session:

        async def ask(body: bytes, due: float) -> Answered:
            sent = time.perf_counter()
            try:
                async with session.post(f"{wanted.address}/v1/recommend", data=body) as answer:
                    raw = await answer.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                return Answered(due, sent, time.perf_counter(), type(error).__name__)
            ended = time.perf_counter()
            answers[due] = raw  # Taken apart when nobody waits any more.
            return Answered(due, sent, ended, str(answer.status))

        use = CpuUse({**wanted.processes, "client": [os.getpid()]})
        found = await open_loop(ask, wanted.bodies, wanted.arrivals)
        shares = use.shares()
    # Both of Python's clocks are the machine's monotonic one on Linux.
    began = found[0].due - wanted.arrivals[0]
    outcome = Outcome(began, cpu_shares=shares)
    for one in found:
        _take(outcome, one, answers.get(one.due, b""))
    return outcome


def _take(outcome: Outcome, answered: Answered, raw: bytes) -> None:
    """Adds what became of a request."""
    is_well = answered.status == _OK
    outcome.statuses.append(answered.status)
    outcome.latencies_ms.append((answered.ended - answered.due) * 1e3 if is_well else nan)
    outcome.late_ms.append((answered.sent - answered.due) * 1e3)
    if not is_well:
        outcome.usage.append({})
        outcome.scores.append(None)
        return
    body = json.loads(raw)
    names = ("history_tokens", "cached_tokens", "rows_requested", "rows_resident")
    outcome.usage.append({name: body["usage"][name] for name in names})
    ordered = sorted(body["data"], key=lambda item: int(item["item_id"]))
    outcome.scores.append(np.array([item["score"] for item in ordered], dtype=np.float32))

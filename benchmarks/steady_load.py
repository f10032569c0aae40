"""Requests at a steady rate, whatever becomes of them; runs in a process of its own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

_CLIENT_SECONDS = 60.0
HUNG_UP = 0
"""In place of a status: the connection broke."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests to offer."""

    address: str
    bodies: Sequence[bytes]
    """JSON; the first ones again when all were sent."""
    times: Sequence[float]
    """Seconds after the start."""
    begins: float
    """When that is, by the system's monotonic clock, which processes share."""


@dataclass(slots=True)
class Answers:
    """What became of them, one entry per request."""

    statuses: list[int]
    latencies_ms: list[float]
    """From the time the request was to be sent to the last byte of its answer."""
    ids: Counter[str] = field(default_factory=Counter)
    """Of the answers with 200, which are named after the requests."""


def offer_steadily(load: Load) -> Answers:
    """Sends everything at its time and waits for the last answer."""
    return asyncio.run(_offer(load))


async def _offer(load: Load) -> Answers:
    number = len(load.times)
    answers = Answers([HUNG_UP] * number, [0.0] * number)
    # No limit: a client that waits for a free connection would not be an open loop.
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_CLIENT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(place: int, due: float) -> None:
            name = f"{load.begins:.6f}-{place}"
            headers = {"Content-Type": "application/json", "X-Request-Id": name}
            body = load.bodies[place % len(load.bodies)]
            url = f"{load.address}/v1/recommend"
            try:
                async with session.post(url, data=body, headers=headers) as answer:
                    said = await answer.json()
            except (aiohttp.ClientError, TimeoutError):
                return
            answers.latencies_ms[place] = (time.monotonic() - due) * 1e3
            answers.statuses[place] = answer.status
            if answer.status == 200:
                answers.ids[said["id"]] += 1

        asking = []
        for place, offset in enumerate(load.times):
            due = load.begins + offset
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            asking.append(asyncio.create_task(ask(place, due)))
        await asyncio.gather(*asking)
    return answers

"""Sends requests over kept connections, open loop or closed loop, and times the answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import numpy as np

from helm_engine.bench.target import headers, said

MAX_CONNECTIONS = 512
"""Below the usual limit of 1024 open files. A request that finds none free waits, and its latency
counts the wait."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; times in seconds of `time.perf_counter`."""

    due: float
    """When it was to be sent: the arrival in the open loop, else when it was sent."""
    sent: float
    """When its task first ran."""
    ended: float
    status: str
    """`200` and other statuses of HTTP, `timeout`, or `connection`."""
    message: str = ""
    """What the server said of an error."""
    history_tokens: int = 0
    cached_tokens: int = 0
    rows_requested: int = 0
    rows_resident: int = 0


Ask = Callable[[bytes, float], Awaitable[Outcome]]
"""Sends a body that was due at a time."""
Watch = Callable[[Outcome], None]
"""Told of each outcome."""


@asynccontextmanager
async def connected(
    address: str, api_key: str | None, timeout_s: float, watch: Watch
) -> AsyncIterator[Ask]:
    """What sends requests to a server, over connections that are kept."""
    async with aiohttp.ClientSession(
        headers={"Content-Type": "application/json", **headers(api_key)},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
    ) as session:
        url = f"{address}/v1/recommend"

        async def ask(body: bytes, due: float) -> Outcome:
            sent = time.perf_counter()
            try:
                async with session.post(url, data=body) as response:
                    raw = await response.read()
                    ended = time.perf_counter()
                    outcome = _outcome(due, sent, ended, response.status, raw)
            except TimeoutError:
                outcome = Outcome(due, sent, time.perf_counter(), "timeout")
            except aiohttp.ClientError as error:
                outcome = Outcome(due, sent, time.perf_counter(), "connection", str(error))
            watch(outcome)
            return outcome

        yield ask


def _outcome(due: float, sent: float, ended: float, status: int, raw: bytes) -> Outcome:
    if status != 200:
        return Outcome(due, sent, ended, str(status), said(status, raw))
    usage = json.loads(raw)["usage"]
    return Outcome(
        due,
        sent,
        ended,
        "200",
        history_tokens=usage["history_tokens"],
        cached_tokens=usage["cached_tokens"],
        rows_requested=usage["rows_requested"],
        rows_resident=usage["rows_resident"],
    )


def poisson_arrivals(
    rate: float, requests: int | None, duration_s: float | None, seed: int
) -> list[float]:
    """Seconds from the start, increasing: so many arrivals, or all within a duration.

    Args:
        rate: arrivals per second.
        requests: how many.
        duration_s: how long; one of the two is None.
        seed: of the arrivals.
    """
    rng = np.random.default_rng([seed, round(rate * 1e6)])
    if requests is not None:
        return [float(one) for one in np.cumsum(rng.exponential(1.0 / rate, requests))]
    assert duration_s is not None
    # Given how many there are, the arrivals of a Poisson process are sorted uniform draws.
    number = max(1, int(rng.poisson(rate * duration_s)))
    return [float(one) for one in np.sort(rng.random(number) * duration_s)]


async def open_loop(ask: Ask, bodies: Sequence[bytes], arrivals: Sequence[float]) -> list[Outcome]:
    """Sends each body at its time, whatever became of those before it.

    Latencies count from the intended time: neither a slow server nor a slow client can hide by
    sending later (Tene's "coordinated omission").
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()
    asked: list[asyncio.Task[Outcome]] = []
    start = time.perf_counter()

    async def one(body: bytes, due: float) -> Outcome:
        return await ask(body, due)

    def send(place: int) -> None:
        asked.append(loop.create_task(one(bodies[place], start + arrivals[place])))

    def keep_time() -> None:
        for place, arrival in enumerate(arrivals):
            if stop.wait(max(0.0, start + arrival - time.perf_counter())):
                return
            loop.call_soon_threadsafe(send, place)

    try:
        # In a thread, because the event loop's own timers are only good to a millisecond.
        await asyncio.to_thread(keep_time)
    finally:
        stop.set()
    return list(await asyncio.gather(*asked))


async def closed_loop(
    ask: Ask, bodies: Iterator[bytes], concurrency: int, duration_s: float | None = None
) -> list[Outcome]:
    """Keeps so many requests in flight until the bodies or the time run out."""
    outcomes: list[Outcome] = []
    end = None if duration_s is None else time.perf_counter() + duration_s

    async def client() -> None:
        for body in bodies:
            outcomes.append(await ask(body, time.perf_counter()))
            if end is not None and time.perf_counter() >= end:
                return

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return outcomes

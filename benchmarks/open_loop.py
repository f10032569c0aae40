"""Offers requests to a server at given times, whatever it answers; runs in a process of its own.

Each seat has a user with visits to come. A visit that was refused or came too late showed nothing
to its user, so the user comes again with the same history; only an answer leads to the next visit.
The work that a request brings is thus the same at every rate.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

_JSON = {"Content-Type": "application/json"}
_CLIENT_SECONDS = 60.0
_POLL_SECONDS = 0.2
_WAITING = re.compile(r"^helm:num_requests_waiting\{[^}]*\} (\S+)$", re.MULTILINE)
HUNG_UP = 0
"""In place of a status: the connection broke."""


@dataclass(frozen=True, slots=True)
class Storm:
    """Requests to offer."""

    address: str
    seats: Sequence[Sequence[bytes]]
    """JSON bodies of each seat's coming visits; the last one is repeated."""
    deadline_ms: float
    """Put into every body."""
    arrivals: Sequence[tuple[float, int]]
    """Seconds after the start, and the seat whose user comes."""


@dataclass(slots=True)
class Outcome:
    """What became of them, one entry per arrival."""

    statuses: list[int]
    latencies: list[float]
    """Seconds from the time the request was to be sent to the last byte of its answer."""
    lags: list[float]
    """Seconds from the time the request was to be sent to the time it was."""
    without_retry_after: int = 0
    """Refusals (429) that do not say when to come again."""
    answered: Counter[int] = field(default_factory=Counter)
    """Visits that each seat got through."""
    most_waiting: int = 0
    """The largest `helm:num_requests_waiting` seen."""
    client_cpu_seconds: float = 0.0


def offer(storm: Storm) -> Outcome:
    """Sends everything and waits for the last answer."""
    return asyncio.run(_Offering(storm).run())


def answer_each(address: str, bodies: Sequence[bytes], at_once: int) -> float:
    """Sends bodies, `at_once` at a time, and returns answers per second.

    Raises:
        RuntimeError: one was not answered with 200.
    """
    return asyncio.run(_closed_loop(address, bodies, at_once))


async def _closed_loop(address: str, bodies: Sequence[bytes], at_once: int) -> float:
    waiting = iter(bodies)

    async def ask(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            async with session.post(f"{address}/v1/recommend", data=body, headers=_JSON) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {await answer.text()}")
                await answer.read()

    async with aiohttp.ClientSession() as session:
        started = time.perf_counter()
        await asyncio.gather(*(ask(session) for _ in range(at_once)))
        return len(bodies) / (time.perf_counter() - started)


class _Offering:
    """One storm."""

    def __init__(self, storm: Storm) -> None:
        self._storm = storm
        number = len(storm.arrivals)
        self._outcome = Outcome([HUNG_UP] * number, [0.0] * number, [0.0] * number)
        self._url = f"{storm.address}/v1/recommend"
        self._with_deadline = f'{{"deadline_ms": {storm.deadline_ms}, '.encode()

    async def run(self) -> Outcome:
        """Sends each request at its time."""
        # No limit: a client that waits for a free connection would not be an open loop.
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=_CLIENT_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            watching = asyncio.create_task(self._watch(session))
            cpu, start = time.process_time(), time.perf_counter()
            asking: list[asyncio.Task[None]] = []
            for number, (offset, seat) in enumerate(self._storm.arrivals):
                due = start + offset
                if (pause := due - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                asking.append(asyncio.create_task(self._ask(session, number, seat, due)))
            await asyncio.gather(*asking)
            self._outcome.client_cpu_seconds = time.process_time() - cpu
            watching.cancel()
        return self._outcome

    async def _ask(
        self, session: aiohttp.ClientSession, number: int, seat: int, due: float
    ) -> None:
        outcome, bodies = self._outcome, self._storm.seats[seat]
        visit = min(outcome.answered[seat], len(bodies) - 1)
        body = self._with_deadline + bodies[visit][1:]
        outcome.lags[number] = time.perf_counter() - due
        try:
            async with session.post(self._url, data=body, headers=_JSON) as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            return
        outcome.statuses[number] = answer.status
        outcome.latencies[number] = time.perf_counter() - due
        # Two requests for one visit may have been on their way: the user moves on once.
        if answer.status == 200 and outcome.answered[seat] == visit:
            outcome.answered[seat] += 1
        elif answer.status == 429 and "Retry-After" not in answer.headers:
            outcome.without_retry_after += 1

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get(f"{self._storm.address}/metrics") as answer:
                gauges = _WAITING.findall(await answer.text())
            waiting = int(sum(map(float, gauges)))
            self._outcome.most_waiting = max(self._outcome.most_waiting, waiting)
            await asyncio.sleep(_POLL_SECONDS)

"""The mixed traffic of a soak: users who return, clients that leave, bad input of every kind."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np

from benchmarks.bundled_visits import NUM_ITEMS, BundledUser

ADMIN_KEY = "soak-admin-key"
MAX_BODY_BYTES = 256 << 10
"""The server's limit: small, so that bodies beyond it are cheap to send."""
BROKEN = "broken connection"
LEFT = "left"
"""In place of a status: the client hung up, as it meant to."""

_SEATS_PER_WORKER = 8
_CLIENT_SECONDS = 60.0
_LONGEST_STAY_SECONDS = 0.02
"""A client that hangs up while it waits does so within this time."""
_JSON, _MSGPACK = "application/json", "application/msgpack"
_PAGES = ("/metrics", "/health", "/info", "/load", "/v1/models", "/version", "/openapi.json")
_HISTORY = {"item_ids": [50, 172, 181], "timestamps": [100, 160, 220]}

BAD_INPUT: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"not json", 400),
    (b'{"history": ', 400),
    (b"\xff\xfe", 400),
    (b"[" * 10_000, 400),
    (b"[]", 400),
    (b"{}", 400),
    (b'{"requests": []}', 400),
    (b'{"requests": [{}], "more": 1}', 400),
    (b'{"history": {"item_ids": [1, NaN], "timestamps": [1, 2]}}', 400),
    *(
        (json.dumps({"history": _HISTORY} | changes).encode(), status)
        for changes, status in (
            ({"history": {**_HISTORY, "item_ids": [1, 2, NUM_ITEMS + 1]}}, 400),
            ({"history": {**_HISTORY, "item_ids": [1, 2, 2**70]}}, 400),
            ({"history": {**_HISTORY, "item_ids": ["a", "b", "c"]}}, 400),
            ({"history": {**_HISTORY, "timestamps": [3, 2, 1]}}, 400),
            ({"history": {"item_ids": [], "timestamps": []}}, 400),
            ({"history": {**_HISTORY, "actions": [1]}}, 400),
            ({"candidates": {"item_ids": []}}, 400),
            ({"candidates": {"item_ids": [1] * 5000}}, 413),
            ({"top_k": 0}, 400),
            ({"top_k": "5"}, 400),
            ({"deadline_ms": -1}, 400),
            ({"user": ""}, 400),
            ({"model": "another"}, 404),
            ({"context": {"age": 3}}, 400),
            ({"fields": ["data.nothing"]}, 400),
            ({"topk": 5}, 400),
            ({"requests": [{}] * 2}, 400),
        )
    ),
)
"""Bodies, and the status that each is refused with."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of traffic."""

    weight: int
    statuses: frozenset[int | str]
    """What may come of it."""


_ANSWERED = frozenset[int | str]({200})
KINDS = {
    "json": _Kind(30, _ANSWERED),
    "msgpack": _Kind(20, _ANSWERED),
    "several": _Kind(12, _ANSWERED),
    "deadline": _Kind(8, frozenset({200, 504})),
    "hang_up_uploading": _Kind(4, frozenset({LEFT})),
    "hang_up_waiting": _Kind(8, frozenset({LEFT})),
    "bad_input": _Kind(8, frozenset({"refused as expected"})),
    "oversized": _Kind(2, frozenset({413})),
    "forget": _Kind(3, _ANSWERED),
    "no_admin_key": _Kind(1, frozenset({401})),
    "page": _Kind(4, _ANSWERED),
}


class Traffic:
    """Workers that ask at once, one request each at a time, and what came of it."""

    def __init__(self, address: str, workers: int, seed: int) -> None:
        self.counts: Counter[tuple[str, int | str]] = Counter()
        """Outcomes by kind and status."""
        self.problems: list[str] = []
        """Outcomes that must not be."""
        self.draining = False
        """Whether the server was told to stop: then it may refuse, until connections end."""
        self._address = address
        self._open = asyncio.Event()
        self._stopped = False
        self._busy = 0
        self._idle = asyncio.Event()
        self._session = self._new_session()
        seeds = np.random.SeedSequence(seed).spawn(workers)
        self._workers = [
            asyncio.create_task(_Worker(self, number, np.random.default_rng(one)).work())
            for number, one in enumerate(seeds)
        ]

    @staticmethod
    def _new_session() -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=_CLIENT_SECONDS)
        return aiohttp.ClientSession(timeout=timeout)

    def resume(self) -> None:
        """Lets the workers ask."""
        self._open.set()

    async def pause(self) -> None:
        """Waits until every worker has its answer, and closes all connections."""
        self._open.clear()
        while self._busy:
            self._idle.clear()
            await self._idle.wait()
        await self._session.close()
        self._session = self._new_session()

    async def stop(self) -> None:
        """Ends the workers, each with its answer."""
        self._stopped = True
        self._open.set()
        await asyncio.gather(*self._workers)
        await self._session.close()

    async def may_ask(self) -> bool:
        """Waits while the traffic is paused; False = stop."""
        await self._open.wait()
        return not self._stopped

    async def count(self, kind: str, ask: Callable[[], Awaitable[int | str]]) -> None:
        """Counts what comes of a request."""
        self._busy += 1
        try:
            status = await ask()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if self.draining:
                self._stopped = True
                return
            status = BROKEN
            self.problems.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            if status not in KINDS[kind].statuses and not (self.draining and status == 503):
                self.problems.append(f"{kind}: status {status}")
        finally:
            self._busy -= 1
            self._idle.set()
        self.counts[kind, status] += 1

    async def send(
        self, path: str, body: bytes, media_type: str = _JSON, admin: bool = False
    ) -> tuple[int, bytes]:
        """POSTs a body; returns the status and the answer."""
        headers = {"Content-Type": media_type}
        if admin:
            headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        url = self._address + path
        async with self._session.post(url, data=body, headers=headers) as answer:
            return answer.status, await answer.read()

    async def get(self, path: str) -> tuple[int, bytes]:
        """GETs a page; returns the status and the page."""
        async with self._session.get(self._address + path) as answer:
            return answer.status, await answer.read()

    async def connect(self) -> asyncio.StreamWriter:
        """A bare connection, for clients that break off."""
        place = urlsplit(self._address)
        return (await asyncio.open_connection(place.hostname, place.port))[1]


class _Worker:
    """Asks one thing after the other, drawn at random."""

    def __init__(self, traffic: Traffic, number: int, rng: np.random.Generator) -> None:
        self._traffic = traffic
        self._rng = rng
        seats = range(number * _SEATS_PER_WORKER, (number + 1) * _SEATS_PER_WORKER)
        self._users = [BundledUser(seat, rng) for seat in seats]
        weights = np.array([kind.weight for kind in KINDS.values()], dtype=float)
        self._names, self._shares = list(KINDS), weights / weights.sum()

    async def work(self) -> None:
        """Works until the traffic stops."""
        while await self._traffic.may_ask():
            kind = str(self._rng.choice(self._names, p=self._shares))
            await self._traffic.count(kind, getattr(self, f"_{kind}"))

    def _visit(self, **fields: Any) -> dict[str, Any]:
        """A good request of a returning user."""
        rng = self._rng
        user = self._users[int(rng.integers(_SEATS_PER_WORKER))]
        body = user.visit()
        if rng.random() < 0.5:
            body["candidates"] = user.candidates(int(rng.integers(1, 200)))
        else:
            body |= {"top_k": int(rng.integers(1, 50)), "exclude_history": True}
        if rng.random() < 0.2:
            body["fields"] = ["data.item_id", "usage.cached_tokens"]
        return body | fields

    async def _json(self) -> int:
        status, answer = await self._traffic.send(
            "/v1/recommend", msgspec.json.encode(self._visit())
        )
        return status if status != 200 or msgspec.json.decode(answer)["data"] else 0

    async def _msgpack(self) -> int:
        body = self._visit()
        for name, values in body["history"].items():
            body["history"][name] = np.array(values, dtype="<i8").tobytes()
        sent = msgspec.msgpack.encode(body)
        status, answer = await self._traffic.send("/v1/recommend", sent, _MSGPACK)
        return status if status != 200 or msgspec.msgpack.decode(answer)["data"] else 0

    async def _several(self) -> int:
        number = int(self._rng.integers(2, 6))
        bodies: list[Any] = [self._visit() for _ in range(number)]
        bodies.append({"history": 7})  # Its error must not touch the others.
        sent = msgspec.json.encode({"requests": bodies})
        status, answer = await self._traffic.send("/v1/recommend", sent)
        if status != 200 or self._traffic.draining:
            return status
        failed = ["error" in one for one in msgspec.json.decode(answer)["data"]]
        return status if failed == [False] * number + [True] else 0

    async def _deadline(self) -> int:
        body = self._visit(deadline_ms=float(self._rng.uniform(1.0, 50.0)))
        return (await self._traffic.send("/v1/recommend", msgspec.json.encode(body)))[0]

    async def _hang_up_uploading(self) -> str:
        return await self._hang_up(float(self._rng.uniform(0.1, 0.9)))

    async def _hang_up_waiting(self) -> str:
        return await self._hang_up(1.0)

    async def _hang_up(self, share: float) -> str:
        """Sends that share of a body, waits a little, and resets the connection."""
        body = msgspec.json.encode(self._visit())
        head = (
            "POST /v1/recommend HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer = await self._traffic.connect()
        writer.write(head.encode() + body[: int(share * len(body))])
        with suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(float(self._rng.uniform(0.0, _LONGEST_STAY_SECONDS)))
        writer.transport.abort()
        return LEFT

    async def _bad_input(self) -> int | str:
        body, expected = BAD_INPUT[int(self._rng.integers(len(BAD_INPUT)))]
        status, answer = await self._traffic.send("/v1/recommend", body)
        told = msgspec.json.decode(answer)["error"]["code"] == expected
        return "refused as expected" if status == expected and told else status

    async def _oversized(self) -> int:
        return (await self._traffic.send("/v1/recommend", b" " * (2 * MAX_BODY_BYTES)))[0]

    async def _forget(self) -> int:
        user = self._users[int(self._rng.integers(_SEATS_PER_WORKER))]
        return (await self._traffic.send(f"/v1/users/{user.name}:forget", b""))[0]

    async def _no_admin_key(self) -> int:
        return (await self._traffic.send("/v1/admin/reload", b"{}"))[0]

    async def _page(self) -> int:
        return (await self._traffic.get(str(self._rng.choice(_PAGES))))[0]

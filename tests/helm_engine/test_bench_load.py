"""The load generator against small servers that misbehave on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from helm_engine.bench.load import (
    Ask,
    Outcome,
    closed_loop,
    connected,
    open_loop,
    poisson_arrivals,
)
from helm_engine.bench.target import find_target

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

USAGE = {"history_tokens": 9, "cached_tokens": 4, "rows_requested": 7, "rows_resident": 2}


def answered() -> web.Response:
    return web.json_response({"data": [], "usage": USAGE})


def asking(
    handler: Handler, watched: list[Outcome] | None = None, timeout_s: float = 30.0
) -> AbstractAsyncContextManager[Ask]:
    """What asks a server with this handler."""

    @asynccontextmanager
    async def context() -> Any:
        app = web.Application()
        app.router.add_post("/v1/recommend", handler)
        watch = (watched if watched is not None else []).append
        async with TestServer(app) as server:
            address = str(server.make_url("")).rstrip("/")
            async with connected(address, "secret", timeout_s, watch) as ask:
                yield ask

    return context()


def test_open_loop_does_not_wait_for_answers_and_counts_from_the_arrival() -> None:
    arrivals = [0.0, 0.001, 0.002, 0.01, 0.02]
    bodies: list[bytes] = []
    watched: list[Outcome] = []

    async def run() -> list[Outcome]:
        all_there = asyncio.Event()

        async def handler(request: web.Request) -> web.Response:
            bodies.append(await request.read())
            if len(bodies) == len(arrivals):
                all_there.set()
            # A closed loop would wait here for ever.
            await all_there.wait()
            return answered()

        async with asking(handler, watched) as ask:
            return await open_loop(ask, [b"%d" % place for place in range(5)], arrivals)

    outcomes = asyncio.run(run())
    assert sorted(bodies) == [b"0", b"1", b"2", b"3", b"4"]
    assert [one.status for one in outcomes] == ["200"] * 5
    assert sorted(outcomes, key=id) == sorted(watched, key=id)
    due = [one.due - outcomes[0].due for one in outcomes]
    assert due == pytest.approx(arrivals, abs=1e-9)
    # None was answered before the last had come, and the wait counts for each of them.
    assert min(one.ended for one in outcomes) >= outcomes[-1].due
    assert all(one.due <= one.sent <= one.ended for one in outcomes)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_closed_loop_keeps_so_many_in_flight(concurrency: int) -> None:
    in_flight: list[int] = [0]
    most: list[int] = []

    async def handler(request: web.Request) -> web.Response:
        in_flight[0] += 1
        most.append(in_flight[0])
        await asyncio.sleep(0.001)
        in_flight[0] -= 1
        return answered()

    async def run() -> list[Outcome]:
        async with asking(handler) as ask:
            return await closed_loop(ask, iter([b"x"] * 20), concurrency)

    outcomes = asyncio.run(run())
    assert len(outcomes) == len(most) == 20
    assert max(most) == concurrency
    assert {(one.cached_tokens, one.rows_resident) for one in outcomes} == {(4, 2)}


def test_a_closed_loop_ends_with_its_time() -> None:
    def endless() -> Any:
        while True:
            yield b"x"

    async def run() -> list[Outcome]:
        async def handler(request: web.Request) -> web.Response:
            return answered()

        async with asking(handler) as ask:
            return await closed_loop(ask, endless(), 2, duration_s=0.05)

    assert asyncio.run(run())


def test_errors_are_told_apart() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret"
        asked = await request.text()
        if asked == "busy":
            error = {"message": "the queue is full", "type": "", "param": None, "code": 429}
            return web.json_response({"error": error}, status=429)
        if asked == "odd":
            return web.Response(text="<html>", status=502)
        if asked == "cut":
            assert request.transport is not None
            request.transport.close()
        await asyncio.sleep(3600)
        return answered()

    async def run() -> list[Outcome]:
        async with asking(handler, timeout_s=0.2) as ask:
            return [await ask(body, 0.0) for body in (b"busy", b"odd", b"cut", b"slow")]

    found = [(one.status, one.message) for one in asyncio.run(run())]
    assert found[:2] == [("429", "429: the queue is full"), ("502", "502")]
    assert [status for status, _ in found[2:]] == ["connection", "timeout"]


def test_poisson_arrivals_have_the_rate_and_the_spread_of_the_law() -> None:
    by_number = poisson_arrivals(50.0, 20_000, None, 3)
    assert len(by_number) == 20_000
    assert by_number == poisson_arrivals(50.0, 20_000, None, 3)
    assert by_number != poisson_arrivals(50.0, 20_000, None, 4)
    by_time = poisson_arrivals(50.0, None, 400.0, 3)
    assert by_time[-1] < 400.0
    assert len(by_time) == pytest.approx(20_000, rel=0.05)
    for arrivals in (by_number, by_time):
        gaps = np.diff([0.0, *arrivals])
        assert (gaps >= 0).all()
        # An exponential's mean and standard deviation are the same.
        assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
        assert gaps.std() == pytest.approx(1 / 50, rel=0.05)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        asyncio.run(find_target(url, None))


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (200, "<html>", "is not that of a HELM Engine"),
        (200, json.dumps({"version": "1"}), "is not that of a HELM Engine"),
        (200, "[]", "is not that of a HELM Engine"),
        (401, json.dumps({"error": {"message": "who are you"}}), "401: who are you"),
        (404, "nothing", "404"),
    ],
)
def test_another_server_is_refused(status: int, text: str, message: str) -> None:
    async def run() -> None:
        app = web.Application()

        async def info(request: web.Request) -> web.Response:
            return web.Response(text=text, status=status)

        app.router.add_get("/info", info)
        async with TestServer(app) as server:
            await find_target(str(server.make_url("")), None)

    with pytest.raises(ValueError, match=message):
        asyncio.run(run())

"""Calls the sync and the async client alike, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from helm_engine.client import AsyncClient, Client
from helm_engine.clock import VirtualClock

KINDS = ("sync", "async")


class Asking:
    """One client after the other, of one kind; waits take no time and are written down."""

    def __init__(
        self,
        kind: str,
        on_sleep: Callable[[], object] = lambda: None,
        handler: Callable[[httpx.Request], httpx.Response] | None = None,
        jitter: Callable[[], float] = lambda: 0.5,
    ) -> None:
        """`handler` answers in the place of a server."""
        self.kind = kind
        self.clock = VirtualClock()
        self.sleeps: list[float] = []
        self._on_sleep = on_sleep
        self._jitter = jitter
        self._transport = None if handler is None else httpx.MockTransport(handler)

    def __call__(
        self,
        address: str,
        method: str,
        *args: Any,
        options: dict[str, Any] | None = None,
        **named: Any,
    ) -> Any:
        """Makes a client, calls a method of it once, and closes it."""
        options = {"clock": self.clock, "jitter": self._jitter, **(options or {})}
        if self.kind == "async":
            return asyncio.run(self._ask_async(address, method, options, args, named))
        http = None if self._transport is None else httpx.Client(transport=self._transport)
        with Client(address, sleep=self._sleep, http_client=http, **options) as client:
            return getattr(client, method)(*args, **named)

    async def _ask_async(
        self, address: str, method: str, options: dict[str, Any], args: Any, named: dict[str, Any]
    ) -> Any:
        async def sleep(seconds: float) -> None:
            self._sleep(seconds)

        http = None if self._transport is None else httpx.AsyncClient(transport=self._transport)
        async with AsyncClient(address, sleep=sleep, http_client=http, **options) as client:
            return await getattr(client, method)(*args, **named)

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.clock.advance(seconds)
        self._on_sleep()

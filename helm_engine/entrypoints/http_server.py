"""A uvicorn server that ends cleanly: it drains, answers whoever still waits, and exits with 0."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from typing import Protocol

import uvicorn

_CUT_OFF_SECONDS = 2
"""Time to write the last answers before connections are closed."""
_DRAIN_POLL_SECONDS = 0.02


class Front(Protocol):
    """What the server needs to know of the application."""

    async def start(self) -> None:
        """Called once, when the server can be reached; raises what keeps it from serving."""

    def begin_draining(self) -> None:
        """New requests are refused from now on."""

    @property
    def num_in_flight(self) -> int:
        """Requests that are being answered."""

    def give_up(self) -> None:
        """Answers all that still wait with an error."""

    def reload(self) -> None:
        """Reads the model again."""


class HttpServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; SIGHUP reloads the model.

    While it drains, new requests and `/health` get 503, so that a load balancer learns of it.
    """

    def __init__(self, config: uvicorn.Config, front: Front, grace_seconds: float) -> None:
        """Takes uvicorn's configuration and what it serves.

        Args:
            config: its `timeout_graceful_shutdown` is set here.
            front: the application.
            grace_seconds: requests in flight have this long to finish after the signal.
        """
        config.timeout_graceful_shutdown = _CUT_OFF_SECONDS
        super().__init__(config)
        self._front = front
        self._grace_seconds = grace_seconds
        self._starting: asyncio.Task[None] | None = None
        self.start_error: Exception | None = None
        """Why the application could not start."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the door, then starts the engine behind it."""
        await super().startup(sockets)
        if self.started:
            self._starting = asyncio.create_task(self._start_front())

    async def _start_front(self) -> None:
        try:
            await self._front.start()
        except Exception as error:
            self.start_error = error
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains, then closes the door."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        self._front.begin_draining()
        until = time.monotonic() + self._grace_seconds
        while self._front.num_in_flight and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self._front.give_up()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals on the loop; uvicorn re-raises them, which would show as a failure."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._front.reload)
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """Binds the address before anything is loaded, so that a taken port is known at once.

    Raises:
        OSError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say they are
    # TCP; without it every answer waits 40 ms for the client's delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound

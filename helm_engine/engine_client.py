"""How asynchronous fronts reach an engine core: here, a thread of the same process."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from helm_engine.engine_core import EngineCore
from helm_engine.exceptions import EngineUnavailableError, HelmError, RequestAbortedError
from helm_engine.request import Request

logger = logging.getLogger(__name__)

_IDLE_CHECK_SECONDS = 1.0
"""Once the engine has had nothing to do for this long, it looks whether anything was leaked."""


class InProcessEngineClient:
    """Runs the step loop on its own thread; requests go in and come out through futures."""

    def __init__(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; answers are delivered on `loop`."""
        self._core = core
        self._loop = loop
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._futures: dict[str, asyncio.Future[Request]] = {}
        self._alive = True
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the step loop is running."""
        return self._alive

    async def submit(self, request: Request) -> Request:
        """Runs one request to its end.

        Raises:
            HelmError: the request's own error: queue full, deadline passed, step failed.
            EngineUnavailableError: the step loop has ended.
        """
        if not self._alive:
            raise EngineUnavailableError("the engine has stopped")
        future: asyncio.Future[Request] = self._loop.create_future()
        self._futures[request.request_id] = future
        self._commands.put(lambda: self._add(request))
        try:
            return await future
        except asyncio.CancelledError:
            aborted = RequestAbortedError("the request was withdrawn")
            self._commands.put(lambda: self._core.fail_request(request, aborted))
            raise
        finally:
            self._futures.pop(request.request_id, None)

    def close(self) -> None:
        """Ends the thread; requests that are still waiting fail."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._core.has_work:
                    self._deliver(self._core.step())
        except Exception:
            logger.exception("the engine loop died")
        finally:
            self._alive = False
            self._loop_call(lambda: self.fail_pending("the engine has stopped"))

    def _take_commands(self) -> bool:
        """Runs what came in, waiting for it when there is nothing else to do; False = stop."""
        block = not self._core.has_work
        checked = False
        while True:
            try:
                timeout = None if checked else _IDLE_CHECK_SECONDS
                command = self._commands.get(block=block, timeout=timeout)
            except queue.Empty:
                if not block:
                    return True
                self._core.check_nothing_leaked()
                checked = True
                continue
            if command is None:
                return False
            command()
            block = False

    def _add(self, request: Request) -> None:
        try:
            self._core.add_request(request)
        except HelmError as error:
            request.error = error
            self._deliver([request])

    def _deliver(self, ended: list[Request]) -> None:
        if ended:
            self._loop_call(lambda: self._resolve(ended))

    def _loop_call(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The event loop is closed: the server is going down and nobody waits any more.
            logger.debug("an answer came after the event loop was closed")

    def _resolve(self, ended: list[Request]) -> None:
        for request in ended:
            future = self._futures.get(request.request_id)
            if future is None or future.done():
                continue
            if request.error is not None:
                future.set_exception(request.error)
            else:
                future.set_result(request)

    def fail_pending(self, reason: str) -> None:
        """Answers all waiting clients with an error; must be called on the event loop."""
        for future in self._futures.values():
            if not future.done():
                future.set_exception(EngineUnavailableError(reason))

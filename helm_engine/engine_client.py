"""An engine core in its own process, as the front's event loop sees it."""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq

from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.config import EngineConfig
from helm_engine.core_process import CoreAddresses, run_core_process
from helm_engine.engine_messages import (
    AddRequest,
    Beat,
    ForgetUser,
    FromCore,
    SetTarget,
    Stop,
    ToCore,
    WithdrawRequest,
)
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import DeadlineExceededError, EngineUnavailableError
from helm_engine.request import Request
from helm_engine.served_model import ServedModel

logger = logging.getLogger(__name__)

# A forked child would inherit threads' locks, sockets and CUDA state.
_SPAWN = multiprocessing.get_context("spawn")
_STOP_SECONDS = 10.0
"""Time for a core to end by itself."""


class EngineClient:
    """Starts one engine core, hands it requests, and notices when it dies or hangs."""

    def __init__(
        self,
        config: EngineConfig,
        hang_seconds: float,
        main: Callable[..., None] = run_core_process,
        tells_residency: bool = False,
    ) -> None:
        """Starts the process; must be called inside a running event loop.

        Args:
            config: the engine's.
            hang_seconds: a core that says nothing for so long is killed.
            main: main function of the process.
            tells_residency: whether it tells this process what it holds; `ServedModel.config` then
                says at which addresses.
        """
        self._loop = asyncio.get_running_loop()
        self._hang_seconds = hang_seconds
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[FromCore] = FrameDecoder(FromCore)
        self._waiting: dict[str, tuple[Request, asyncio.Future[Request]]] = {}
        self._calls: dict[int, asyncio.Future[float]] = {}
        self._numbers = count()
        self._last_heard = self._last_checked = self._last_beat = time.monotonic()
        self._watch: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[int] | None = None
        self._is_ready = False
        self.stats = EngineStats()
        """As last reported."""
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Set, with the reason, once the core's process is no longer of use."""
        self._directory = Path(tempfile.mkdtemp(prefix="helm-engine-"))
        self._context = zmq.Context()
        if tells_residency:
            residency = replace(
                config.residency,
                endpoint=self._address("events"),
                replay_endpoint=self._address("replay"),
            )
            config = replace(config, residency=residency)
        try:
            self._start(config, main)
        except BaseException:
            # Tried again and again, what is left behind would make matters worse.
            self._free_sockets()
            raise

    def _start(self, config: EngineConfig, main: Callable[..., None]) -> None:
        self._outbox = self._socket(zmq.PUSH)
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(self._address("from-core"))
        addresses = CoreAddresses(*(self._address(name) for name in ("to-core", "from-core")))
        self._pipe, child_pipe = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=main,
            args=(config, addresses, child_pipe, logging.getLogger().getEffectiveLevel()),
            name="helm-engine-core",
            daemon=True,
        )
        self._process.start()
        # Should this process end without `close`: it would wait for a child that ignores SIGTERM.
        atexit.register(self._process.kill)
        child_pipe.close()
        self._loop.add_reader(self._process.sentinel, self._process_ended)
        self._loop.add_reader(self._inbox.fileno(), self._read)

    def _address(self, name: str) -> str:
        return f"ipc://{self._directory / name}"

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.set_hwm(0)
        made.setsockopt(zmq.LINGER, 0)
        return made

    @property
    def pid(self) -> int | None:
        """The core's process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether requests can be given to the core."""
        return not self.ended.done()

    @property
    def num_in_flight(self) -> int:
        """Requests that wait for their end."""
        return len(self._waiting)

    async def ready(self) -> ServedModel:
        """Waits until the model is loaded and warm; until then nothing may be submitted.

        Raises:
            ValueError: the model or a setting cannot be served; see `load_engine`.
            OSError: likewise.
            HelmError: the first step failed.
            EngineUnavailableError: the process ended before it was ready.
        """
        ready = self._loop.create_future()
        self._loop.add_reader(self._pipe.fileno(), _receive, self._pipe, ready)
        try:
            done, _ = await asyncio.wait((ready, self.ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._loop.remove_reader(self._pipe.fileno())
        # What the process said before it ended says more than that it ended.
        if ready not in done and self._pipe.poll():
            _receive(self._pipe, ready)
        if not ready.done():
            raise EngineUnavailableError(self.ended.result())
        said = ready.result()
        if isinstance(said, Exception):
            raise said
        assert isinstance(said, ServedModel)
        # This side connects: sending then never waits, not even for a core that is gone.
        self._outbox.connect(self._address("to-core"))
        self._is_ready = True
        self._last_heard = self._last_checked = self._last_beat = time.monotonic()
        self._check_heartbeat()
        return said

    async def submit(self, request: Request) -> Request:
        """Runs one request to its end; the outcome is written into it.

        Raises:
            HelmError: the request's own error: queue full, step failed.
            DeadlineExceededError: its deadline passed, here or there.
            EngineUnavailableError: the core died or hung.
        """
        if not self.is_alive:
            raise EngineUnavailableError(self.ended.result())
        future: asyncio.Future[Request] = self._loop.create_future()
        self._waiting[request.request_id] = (request, future)
        self._send(AddRequest.of(request))
        try:
            # The core looks between steps only, and one that hangs does not look at all.
            async with asyncio.timeout(_until(request.deadline)):
                return await future
        except TimeoutError:
            self._send(WithdrawRequest(request.request_id))
            raise DeadlineExceededError("the deadline passed") from None
        except asyncio.CancelledError:
            self._send(WithdrawRequest(request.request_id))
            raise
        finally:
            self._waiting.pop(request.request_id, None)

    async def forget_user(self, user_tag: int) -> int:
        """Drops a user's KV; returns the number of blocks.

        Raises:
            EngineUnavailableError: the core died or hung, and all its KV with it.
        """
        return int(await self._call(lambda number: ForgetUser(number, user_tag)))

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool; see `Boundary.set_target`.

        Raises:
            EngineUnavailableError: the core died or hung.
        """
        return await self._call(lambda number: SetTarget(number, emb_fraction))

    async def _call(self, message: Callable[[int], ToCore]) -> float:
        """Sends a message that carries a number, and waits for the answer that repeats it."""
        if not self.is_alive:
            raise EngineUnavailableError(self.ended.result())
        number = next(self._numbers)
        self._calls[number] = self._loop.create_future()
        self._send(message(number))
        try:
            return await self._calls[number]
        finally:
            self._calls.pop(number)

    def fail_pending(self, reason: str) -> None:
        """Answers all waiting clients with an error."""
        error = EngineUnavailableError(reason)
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)

    def silence(self) -> float:
        """Seconds since the core's process last showed that it runs; a long step does not count."""
        self._read()
        return time.monotonic() - self._last_beat

    def abandon(self, reason: str) -> None:
        """Withdraws all requests, whose callers get an error and may ask another engine."""
        for request_id in self._waiting:
            self._send(WithdrawRequest(request_id))
        self.fail_pending(reason)

    async def drain(self) -> None:
        """Waits until no request is in flight."""
        while self._waiting and self.is_alive:
            pending: list[asyncio.Future[Any]] = [future for _, future in self._waiting.values()]
            await asyncio.wait([*pending, self.ended], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> int:
        """Ends the core and returns its exit status; requests that still wait fail.

        It goes on when its caller is cancelled, and may be called again.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        return await asyncio.shield(self._closing)

    async def _close(self) -> int:
        self._send(Stop())
        self._end("the engine has stopped")
        if self._is_ready:
            await asyncio.to_thread(self._process.join, _STOP_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            await asyncio.to_thread(self._process.join, _STOP_SECONDS)
        status = self._process.exitcode
        if status is None:
            # Within a system call that does not return: whatever holds it, we go on.
            logger.error("the engine core (process %s) cannot be killed", self.pid)
        else:
            atexit.unregister(self._process.kill)
            self._process.close()
        self._pipe.close()
        self._free_sockets()
        return -1 if status is None else status

    def _free_sockets(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, message: ToCore) -> None:
        if self.is_alive and self._is_ready:
            self._outbox.send_multipart(self._encoder.encode(message), copy=False)

    def _read(self) -> None:
        """Takes over all that the core has said; ZeroMQ signals once for several messages."""
        while not self._inbox.closed and self._inbox.poll(0):
            frames = [frame.buffer for frame in self._inbox.recv_multipart(copy=False)]
            self._take(self._decoder.decode(frames))

    def _take(self, message: FromCore) -> None:
        self._last_beat = time.monotonic()
        if isinstance(message, Beat):
            return
        self._last_heard = self._last_beat
        self.stats = message.stats
        for ended in message.ended:
            waiting = self._waiting.get(ended.request_id)
            if waiting is None or waiting[1].done():
                continue
            request, future = waiting
            ended.complete(request)
            if request.error is not None:
                future.set_exception(request.error)
            else:
                future.set_result(request)
        for done in message.calls_done:
            call = self._calls.get(done.call)
            if call is not None and not call.done():
                call.set_result(done.value)

    def _check_heartbeat(self) -> None:
        """Kills a core that has said nothing for too long."""
        if not self.is_alive:
            return
        self._read()
        now = time.monotonic()
        if now - self._last_checked > self._hang_seconds / 2:
            # This process slept, and perhaps the whole machine: the core may speak first.
            self._last_heard = now
        self._last_checked = now
        silence = now - self._last_heard
        if silence > self._hang_seconds:
            logger.error("the engine core has said nothing for %.1f s: it is killed", silence)
            self._end("the engine hangs and is restarted")
            self._process.kill()
            return
        self._watch = self._loop.call_later(self._hang_seconds / 4, self._check_heartbeat)

    def _process_ended(self) -> None:
        self._process.join()
        if self.is_alive:
            self._read()  # Its last words.
            self._end(f"the engine has ended (status {self._process.exitcode})")

    def _end(self, reason: str) -> None:
        """Nothing more is expected of the core: whoever waits is told."""
        if self.is_alive:
            self.ended.set_result(reason)
            self._loop.remove_reader(self._process.sentinel)
            self._loop.remove_reader(self._inbox.fileno())
            if self._watch is not None:
                self._watch.cancel()
            self.fail_pending(reason)


def _until(deadline: float) -> float | None:
    """Seconds until a time of the engine's clock; None = there is none."""
    return None if deadline == inf else max(0.0, deadline - time.monotonic())


def _receive(pipe: Connection, ready: asyncio.Future[Any]) -> None:
    """Takes what the core says of its start; nothing if it ended without a word."""
    if ready.done():
        return
    try:
        ready.set_result(pipe.recv())
    except (EOFError, OSError):
        asyncio.get_running_loop().remove_reader(pipe.fileno())

"""An engine on another host, as a front sees it: a member of its fleet.

The host keeps its engine running; this side notices when it falls silent, and when another engine
has taken the first one's place.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.engine_host import MAX_MESSAGE_BYTES
from helm_engine.engine_messages import ForgetUser, SetTarget, WithdrawRequest
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import DeadlineExceededError, EngineUnavailableError, ReloadError
from helm_engine.fleet_member import CoreClient, Engine
from helm_engine.remote_messages import (
    BEAT_SECONDS,
    PROTOCOL,
    FromHost,
    FrontBeat,
    FrontLeaves,
    HostReport,
    Refusal,
    ReloadModel,
    SubmitRequest,
    ToHost,
    Welcome,
    heard,
)
from helm_engine.request import Request
from helm_engine.served_model import ServedModel

logger = logging.getLogger(__name__)

JOIN_SECONDS = 10.0
"""A start waits so long for an engine of another host; it may join later too."""


class _Connection:
    """Messages to and from one host, and what waits for its answers."""

    def __init__(self, address: str, take: Callable[[FromHost], None]) -> None:
        """Connects; must be called inside a running event loop.

        Args:
            address: of the host.
            take: called with each message.
        """
        self._take = take
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[FromHost] = FrameDecoder(FromHost)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # The same name whenever it connects anew.
        self._socket.setsockopt(zmq.ROUTING_ID, uuid.uuid4().bytes)
        # A cut cable is noticed, and the connection made again when it is mended.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3000)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(address)
        self.waiting: dict[str, tuple[Request, asyncio.Future[Request]]] = {}
        self.calls: dict[int, asyncio.Future[float]] = {}
        self._numbers = count()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                message = self._decoder.decode([frame.buffer for frame in frames])
            except Exception as error:
                logger.warning("a message that is none was received: %s", error)
                continue
            self._take(message)

    def send(self, message: ToHost) -> None:
        """Sends, or keeps it until the host can be reached."""
        self._socket.send_multipart(self._encoder.encode(message), copy=False)

    async def call(self, message: Callable[[int], ToHost]) -> float:
        """Sends a message that carries a number, and waits for the answer that repeats it."""
        number = next(self._numbers)
        self.calls[number] = asyncio.get_running_loop().create_future()
        self.send(message(number))
        try:
            return await self.calls[number]
        finally:
            self.calls.pop(number)

    def settle(self, report: HostReport) -> None:
        """Tells those who wait what became of their requests and calls."""
        for ended in report.ended:
            waiting = self.waiting.get(ended.request_id)
            if waiting is None or waiting[1].done():
                continue
            request, future = waiting
            heard(ended, request)
            if request.error is not None:
                future.set_exception(request.error)
            else:
                future.set_result(request)
        for done in report.calls_done:
            call = self.calls.get(done.call)
            if call is not None and not call.done():
                call.set_result(done.value)
        for failed in report.calls_failed:
            call = self.calls.get(failed.call)
            if call is not None and not call.done():
                call.set_exception(failed.error.exception())

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""
        error = EngineUnavailableError(reason)
        for _, future in self.waiting.values():
            if not future.done():
                future.set_exception(error)
        for call in self.calls.values():
            if not call.done():
                call.set_exception(error)

    async def close(self) -> None:
        """Ends the connection."""
        self.send(FrontLeaves())
        # ZeroMQ sends on a thread of its own, and nobody waits for it.
        await asyncio.sleep(BEAT_SECONDS)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._context.destroy(linger=0)


class RemoteClient:
    """One engine of the host, from its welcome to its end."""

    def __init__(self, connection: _Connection, version: str) -> None:
        self._connection = connection
        self._version = version
        self._silence = 0.0
        self._last_heard = time.monotonic()
        self.pid = None
        self.stats = EngineStats()
        """As last reported."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set, with the reason, once nothing more is expected of the engine."""

    @property
    def is_alive(self) -> bool:
        """Whether requests can be given to the engine."""
        return not self.ended.done()

    @property
    def num_in_flight(self) -> int:
        """Requests of this front that wait for their end."""
        return len(self._connection.waiting)

    def silence(self) -> float:
        """Seconds since its process showed that it runs, as far as this side can know."""
        return self._silence + time.monotonic() - self._last_heard

    def note(self, report: HostReport) -> None:
        """Takes over how the engine is."""
        self._silence, self._last_heard = report.silence, time.monotonic()
        self.stats = report.stats

    async def submit(self, request: Request) -> Request:
        """Runs one request to its end; see `EngineClient.submit`."""
        if not self.is_alive:
            raise EngineUnavailableError(self.ended.result())
        connection, now = self._connection, time.monotonic()
        future: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        connection.waiting[request.request_id] = (request, future)
        connection.send(SubmitRequest.of(request, self._version, now))
        left = None if request.deadline == inf else max(0.0, request.deadline - now)
        try:
            async with asyncio.timeout(left):
                return await future
        except TimeoutError:
            connection.send(WithdrawRequest(request.request_id))
            raise DeadlineExceededError("the deadline passed") from None
        except asyncio.CancelledError:
            connection.send(WithdrawRequest(request.request_id))
            raise
        finally:
            connection.waiting.pop(request.request_id, None)

    async def forget_user(self, user_tag: int) -> int:
        """Drops a user's KV; returns the number of blocks."""
        return int(await self._call(lambda number: ForgetUser(number, user_tag)))

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool; returns the share that will be reached."""
        return await self._call(lambda number: SetTarget(number, emb_fraction))

    async def _call(self, message: Callable[[int], ToHost]) -> float:
        if not self.is_alive:
            raise EngineUnavailableError(self.ended.result())
        return await self._connection.call(message)

    def abandon(self, reason: str) -> None:
        """Withdraws all requests, whose callers get an error and may ask another engine."""
        for request_id in self._connection.waiting:
            self._connection.send(WithdrawRequest(request_id))
        self.fail_pending(reason)

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""
        self._connection.fail_pending(reason)

    def end(self, reason: str) -> None:
        """Nothing more is expected of the engine."""
        if self.is_alive:
            self.ended.set_result(reason)

    async def drain(self) -> None:
        """Waits until no request is in flight."""
        while self._connection.waiting and self.is_alive:
            pending: list[asyncio.Future[Any]] = [
                future for _, future in self._connection.waiting.values()
            ]
            await asyncio.wait([*pending, self.ended], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> int:
        """Ends it for this front alone."""
        self.end("the server is shutting down")
        return 0


class RemoteEngine:
    """A place in the fleet for the engine of one host."""

    def __init__(
        self, address: str, user_key: bytes, lost_seconds: float, join_seconds: float = JOIN_SECONDS
    ) -> None:
        """Connects to nothing yet.

        Args:
            address: `tcp://host:port`.
            user_key: keys the hashes of users, the same for all fronts of the engine.
            lost_seconds: a host that says nothing for so long is given up until it speaks again.
            join_seconds: how long `start` waits for it.
        """
        self.name = address.removeprefix("tcp://")
        self.num_restarts = 0
        """Engines that died, hung or were lost, and came back."""
        self.num_reloads = 0
        self.model_name = ""
        self.is_leaving = False
        """Whether its host is about to stop."""
        self.why_none = f"no engine answers at {address}"
        self._address = address
        self._user_key = user_key
        self._lost_seconds = lost_seconds
        self._join_seconds = join_seconds
        self._engine: Engine | None = None
        self._client: RemoteClient | None = None
        self._connection: _Connection | None = None
        self._host: str | None = None
        self._life: int | None = None
        self._is_reloading = False
        self._changed = asyncio.Event()
        self._beats: asyncio.Task[None] | None = None

    @property
    def current(self) -> Engine | None:
        """The engine that takes requests, or None."""
        return self._engine

    @property
    def clients(self) -> list[CoreClient]:
        """The engine that answers; its host knows those that finish their last."""
        return [] if self._client is None else [self._client]

    async def start(self) -> ServedModel | None:
        """Connects, and waits some seconds for the engine to be ready; else it joins later."""
        self._connection = _Connection(self._address, self._take)
        self._beats = asyncio.create_task(self._beat())
        try:
            async with asyncio.timeout(self._join_seconds):
                while self._engine is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.warning("engine %s: %s; it joins when it can", self.name, self.why_none)
            return None
        return self._engine.served

    async def _beat(self) -> None:
        """Shows the host that this front is there, and looks whether the host is."""
        assert self._connection is not None
        while True:
            life = None if self._client is None else self._life
            self._connection.send(FrontBeat(PROTOCOL, self._host, life))
            client = self._client
            if client is not None and client.silence() > self._lost_seconds:
                self._lose("it says nothing any more")
            await asyncio.sleep(BEAT_SECONDS)

    def _take(self, message: FromHost) -> None:
        assert self._connection is not None
        if isinstance(message, Refusal):
            self._lose(message.reason)
        elif isinstance(message, Welcome):
            self._welcome(message)
        else:
            self._connection.settle(message)
            self._note(message)

    def _welcome(self, message: Welcome) -> None:
        assert self._connection is not None
        if (message.host, message.life) == (self._host, self._life) and self._client is not None:
            return
        try:
            served = message.model.served(self.name.rpartition(":")[0])
        except ValueError as error:
            self._lose(f"what it serves cannot be read: {error}")
            return
        if self._host not in (None, message.host):
            self._lose("its host was started anew")
        if self._life is not None and not self._is_reloading:
            self.num_restarts += 1
        self._end("another engine has taken its place")
        self._host, self._life = message.host, message.life
        self._client = RemoteClient(self._connection, served.version)
        self._engine = Engine(self._client, served, served.input_processor(self._user_key))
        self.model_name = served.name
        self._changed.set()
        logger.info("engine %s ready: model %s", self.name, served.name)

    def _note(self, report: HostReport) -> None:
        self.is_leaving = report.is_leaving
        if report.life is None:
            # Its requests are answered by the host, each with the error that it met.
            self._end(report.why_none)
        elif self._client is not None and (report.host, report.life) == (self._host, self._life):
            self._client.note(report)

    def _lose(self, reason: str) -> None:
        """Gives up the engine and all that waits for it."""
        if self._client is not None:
            logger.error("engine %s: %s", self.name, reason)
        self._end(reason)
        if self._connection is not None:
            self._connection.fail_pending(f"engine {self.name}: {reason}")

    def _end(self, reason: str) -> None:
        self.why_none = f"engine {self.name}: {reason}"
        if self._client is not None:
            self._client.end(reason)
        self._client = self._engine = None

    async def reload(self, model_dir: Path | None) -> ServedModel:
        """Has the host put a model in the place of the one served.

        Raises:
            ReloadError: the host could not.
            EngineUnavailableError: it cannot be reached.
        """
        if self._connection is None or self._engine is None:
            raise EngineUnavailableError(self.why_none)
        directory = None if model_dir is None else str(model_dir)
        self._is_reloading = True
        try:
            await self._connection.call(lambda number: ReloadModel(number, directory))
        except EngineUnavailableError as error:
            raise ReloadError(f"the model was not replaced: {error}") from error
        finally:
            self._is_reloading = False
        self.num_reloads += 1
        # The host welcomes this front to the new engine before it answers the call.
        if self._engine is None:
            raise EngineUnavailableError(self.why_none)
        return self._engine.served

    async def settled(self) -> None:
        """Nothing to wait for: the host answers a reload when the engine before has ended."""

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool; the host keeps it for engines that follow."""
        if self._client is None:
            raise EngineUnavailableError(self.why_none)
        return await self._client.set_target(emb_fraction)

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""
        if self._connection is not None:
            self._connection.fail_pending(reason)

    async def close(self) -> bool:
        """Leaves the host, whose engine goes on."""
        if self._beats is not None:
            self._beats.cancel()
        self._end("the server is shutting down")
        if self._connection is not None:
            self._connection.fail_pending("the server is shutting down")
            await self._connection.close()
        return True

"""One engine for fronts on other hosts: what `helm-engine engine` runs.

The process looks after the engine core as a front does, and passes requests on: any number of
fronts reach it at one TCP address (a ZeroMQ ROUTER). A front that is gone leaves no work behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import zmq
import zmq.asyncio

from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.clock import SystemClock
from helm_engine.engine_messages import (
    CallDone,
    EndedRequest,
    ForgetUser,
    RequestError,
    SetTarget,
    WithdrawRequest,
)
from helm_engine.engine_stats import EngineStats
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.exceptions import EngineUnavailableError, HelmError
from helm_engine.fleet_member import CoreClient, Engine
from helm_engine.remote_messages import (
    BEAT_SECONDS,
    PROTOCOL,
    CallFailed,
    FromHost,
    FrontBeat,
    FrontLeaves,
    HostReport,
    Refusal,
    ReloadModel,
    ServedMessage,
    SubmitRequest,
    ToHost,
    Welcome,
    told,
)

logger = logging.getLogger(__name__)

FRONT_SECONDS = 10.0
"""A front that says nothing for so long is gone, and its requests are withdrawn."""
MAX_MESSAGE_BYTES = 256 << 20
"""Longer messages are from nobody that we know."""


class _Front:
    """A front that has spoken."""

    def __init__(self) -> None:
        self.last_heard = time.monotonic()
        self.life: int | None = None
        """The engine that it knows of."""
        self.tasks: dict[str, asyncio.Task[None]] = {}
        """Its requests, by their ids."""

    def leave(self) -> None:
        """Withdraws its requests."""
        for task in self.tasks.values():
            task.cancel()


class EngineHost:
    """Answers fronts at an address, with the engine that a supervisor keeps."""

    def __init__(self, address: str, supervisor: EngineSupervisor) -> None:
        """Binds the address; must be called inside a running event loop.

        Raises:
            zmq.ZMQError: it cannot be bound.
        """
        self._supervisor = supervisor
        self._clock = SystemClock()
        self._host = uuid.uuid4().hex
        self._engine: Engine | None = None
        self._life = 0
        self._fronts: dict[bytes, _Front] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[ToHost] = FrameDecoder(ToHost)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # A front that connects anew keeps its name.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self.is_leaving = False
        """Whether fronts are told to send nothing more."""
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]

    @property
    def address(self) -> str:
        """Where fronts reach it; the port is there if it was left to the system."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def num_in_flight(self) -> int:
        """Requests of fronts that have not ended."""
        return sum(len(front.tasks) for front in self._fronts.values())

    async def close(self) -> None:
        """Answers nobody any more."""
        for front in self._fronts.values():
            front.leave()
        for task in [*self._tasks, *self._calls]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._calls, return_exceptions=True)
        self._context.destroy(linger=0)

    # ---------------------------------------------------------------- what fronts say

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            sender = frames[0].bytes
            try:
                message = self._decoder.decode([frame.buffer for frame in frames[1:]])
            except Exception as error:
                # Anybody can send anything to an open port; it must not end an engine.
                logger.warning("a message that is none was received: %s", error)
                self._send(sender, Refusal(f"a message could not be read: {error}"))
                continue
            self._take(sender, message)

    def _take(self, sender: bytes, message: ToHost) -> None:
        front = self._fronts.get(sender)
        if front is None:
            if isinstance(message, FrontLeaves):
                return
            front = self._fronts[sender] = _Front()
        front.last_heard = time.monotonic()
        if isinstance(message, FrontBeat):
            if message.protocol != PROTOCOL:
                reason = f"it speaks protocol {PROTOCOL}, this front {message.protocol}"
                self._send(sender, Refusal(reason))
                return
            front.life = message.life if message.host == self._host else None
            if front.life != self._life:
                self._tell(sender, front)
        elif isinstance(message, SubmitRequest):
            request_id = message.request.request_id
            task = asyncio.create_task(self._run(sender, message))
            front.tasks[request_id] = task
            task.add_done_callback(lambda _: front.tasks.pop(request_id, None))
        elif isinstance(message, WithdrawRequest):
            withdrawn = front.tasks.get(message.request_id)
            if withdrawn is not None:
                withdrawn.cancel()
        elif isinstance(message, FrontLeaves):
            self._fronts.pop(sender).leave()
        else:
            call = asyncio.create_task(self._call(sender, message))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _run(self, sender: bytes, message: SubmitRequest) -> None:
        """Runs a request to its end and tells its front."""
        ended = await run_submitted(message, self._clock.now(), self._serving)
        self._send(sender, self._report(ended=[ended]))

    def _serving(self) -> tuple[CoreClient, str]:
        engine = self._supervisor.engine
        return engine.client, engine.served.version

    async def _call(self, sender: bytes, message: ForgetUser | SetTarget | ReloadModel) -> None:
        try:
            done = CallDone(message.call, await self._carry_out(message))
        except (HelmError, ValueError) as error:
            told_error = error if isinstance(error, HelmError) else HelmError(str(error))
            failed = CallFailed(message.call, RequestError.of(told_error))
            self._send(sender, self._report(calls_failed=[failed]))
        else:
            self._send(sender, self._report(calls_done=[done]))

    async def _carry_out(self, message: ForgetUser | SetTarget | ReloadModel) -> float:
        supervisor = self._supervisor
        if isinstance(message, SetTarget):
            return await supervisor.set_target(message.emb_fraction)
        if isinstance(message, ForgetUser):
            calls = [client.forget_user(message.user_tag) for client in supervisor.clients]
            return sum(await asyncio.gather(*map(_or_nothing, calls)))
        directory = None if message.model_dir is None else Path(message.model_dir)
        await supervisor.reload(directory)
        self._tell_all()
        await supervisor.settled()
        return 0.0

    # ---------------------------------------------------------------- what fronts are told

    async def _beat(self) -> None:
        while True:
            now = time.monotonic()
            for sender, front in list(self._fronts.items()):
                if now - front.last_heard > FRONT_SECONDS:
                    logger.warning("a front is gone, with %d requests", len(front.tasks))
                    self._fronts.pop(sender).leave()
            self._tell_all()
            await asyncio.sleep(BEAT_SECONDS)

    def _tell_all(self) -> None:
        for sender, front in self._fronts.items():
            self._tell(sender, front)

    def _tell(self, sender: bytes, front: _Front) -> None:
        """How the engine is, after what it is where that is news."""
        engine = self._present()
        if engine is not None and front.life != self._life:
            front.life = self._life
            model = ServedMessage.of(engine.served)
            self._send(sender, Welcome(self._host, self._life, model))
        self._send(sender, self._report())

    def _present(self) -> Engine | None:
        """The engine that answers; another one gets another number."""
        engine = self._supervisor.current
        if engine is not self._engine:
            self._engine = engine
            self._life += engine is not None
        return engine

    def _report(self, **news: list[object]) -> HostReport:
        engine = self._present()
        return HostReport(
            host=self._host,
            life=None if engine is None else self._life,
            why_none="" if engine is not None else self._supervisor.why_none,
            silence=0.0 if engine is None else engine.client.silence(),
            is_leaving=self.is_leaving,
            stats=EngineStats() if engine is None else engine.client.stats,
            **news,  # type: ignore[arg-type]  # lists of what the fields hold
        )

    def _send(self, sender: bytes, message: FromHost) -> None:
        # Sent at once: there is no limit to what waits for a front.
        self._socket.send_multipart([sender, *self._encoder.encode(message)], copy=False)


async def run_submitted(
    message: SubmitRequest, now: float, serving: Callable[[], tuple[CoreClient, str]]
) -> EndedRequest:
    """Runs a front's request to its end.

    Args:
        message: the request.
        now: seconds of this host's clock.
        serving: the core and the version of its model; raises EngineUnavailableError for none.
    """
    request = message.received(now)
    try:
        client, version = serving()
        if version != message.version:
            raise EngineUnavailableError(f"version {message.version} is not served any more")
        await client.submit(request)
    except HelmError as error:
        request.error = error
    except Exception:
        logger.exception("a request failed unexpectedly")
        request.error = HelmError("internal error")
    return told(request)


async def _or_nothing(call: Awaitable[int]) -> int:
    """What a call answers; an engine that is gone has nothing to forget."""
    try:
        return await call
    except EngineUnavailableError:
        return 0

"""Engines that are replicas of a Ray Serve deployment, as one member of a front's fleet.

Ray Serve starts, replaces and counts the replicas, and `router.ray_serve` picks one for each
request; this side turns requests into calls, asks elsewhere where a replica fails one, and gathers
what the replicas report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.engine_choice import load_routing_kernels, outcome_of, work_of
from helm_engine.engine_messages import EndedRequest, RequestError
from helm_engine.engine_stats import EngineStats, together
from helm_engine.exceptions import (
    DeadlineExceededError,
    EngineUnavailableError,
    QueueFullError,
    ReloadError,
    StepFailedError,
)
from helm_engine.fleet_member import CoreClient, Engine
from helm_engine.fleet_requests import MAX_ATTEMPTS
from helm_engine.ray_replica import ReplicaReport
from helm_engine.remote_messages import SubmitRequest, heard
from helm_engine.request import Request
from helm_engine.served_model import ServedModel
from router.routed_call import RoutedCall

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""Between two rounds of asking all replicas how they are."""
_ANSWER_SECONDS = 5.0
"""A replica that does not answer such a question for so long counts as gone."""
_GONE = (RayError, RayServeException)


class RayClient:
    """The replicas, as the cores of one model version."""

    def __init__(self, handle: DeploymentHandle[Any], served: ServedModel) -> None:
        """Takes the deployment and what its replicas serve."""
        self._handle = handle
        self._recommend = handle.recommend
        self._served = served
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[EndedRequest] = FrameDecoder(EndedRequest)
        self._asking: set[asyncio.Task[EndedRequest]] = set()
        self._why_given_up = ""
        self._last_heard = time.monotonic()
        self.pid = None
        self.num_replicas = 1
        """That answered last."""
        self.stats = EngineStats()
        """Of all replicas together, as last reported."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set, with the reason, once nothing more is expected of them."""

    @property
    def is_alive(self) -> bool:
        """Whether requests can be given to them."""
        return not self.ended.done()

    @property
    def num_in_flight(self) -> int:
        """Requests of this front that wait for their end."""
        return len(self._asking)

    def silence(self) -> float:
        """Seconds since any replica reported."""
        return time.monotonic() - self._last_heard

    def note(self, reports: Sequence[ReplicaReport]) -> None:
        """Takes over how the replicas are."""
        self._last_heard = time.monotonic()
        self.num_replicas = len(reports)
        self.stats = together([report.stats for report in reports])

    # ---------------------------------------------------------------- requests

    async def submit(self, request: Request) -> Request:
        """Runs one request to its end, on another replica where one fails it.

        Raises:
            HelmError: the request's own error: queue full, step failed.
            DeadlineExceededError: its deadline passed, here or there.
            EngineUnavailableError: replicas died or do not serve this model any more.
        """
        call = RoutedCall(work_of(request, self._served.layout.block_tokens), ())
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._try(request, call)
            except (EngineUnavailableError, StepFailedError, QueueFullError):
                is_late = time.monotonic() > request.deadline
                if is_late or self._why_given_up:
                    raise
                if attempt >= min(MAX_ATTEMPTS, self.num_replicas):
                    raise

    async def _try(self, request: Request, call: RoutedCall) -> Request:
        """One attempt; the router is told how it ended."""
        left = None if request.deadline == inf else max(0.0, request.deadline - time.monotonic())
        asking = asyncio.ensure_future(self._ask(request, call))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        try:
            async with asyncio.timeout(left):
                ended = await asking
        except TimeoutError:
            call.abandoned()
            raise DeadlineExceededError("the deadline passed") from None
        except asyncio.CancelledError:
            call.abandoned()
            asking.cancel()
            if self._why_given_up and asking.cancelled():
                raise EngineUnavailableError(self._why_given_up) from None
            raise
        except _GONE as error:
            call.failed()
            reason = f"replica {call.replica} failed: {type(error).__name__}"
            logger.warning("%s", reason)
            raise EngineUnavailableError(reason) from error
        heard(ended, request)
        if request.error is None:
            call.finished(**outcome_of(request))
            return request
        if isinstance(request.error, EngineUnavailableError | StepFailedError):
            call.failed()
        else:
            call.abandoned()
        raise request.error

    async def _ask(self, request: Request, call: RoutedCall) -> EndedRequest:
        """Has a replica run a request; one that nobody waits for is withdrawn."""
        message = SubmitRequest.of(request, self._served.version, time.monotonic())
        call.frames = [bytes(frame) for frame in self._encoder.encode(message)]
        response = self._recommend.remote(call)
        try:
            return self._decoder.decode(await response)
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise

    # ---------------------------------------------------------------- all replicas

    async def forget_user(self, user_tag: int) -> int:
        """Drops a user's KV from every replica; returns the number of blocks."""
        return sum(int(value) for value in await self._call_all("forget_user", user_tag))

    async def set_target(self, emb_fraction: float) -> float:
        """Asks every replica for another split of its pool; returns the least share to come."""
        return min(await self._call_all("set_target", emb_fraction))

    async def _call_all(self, method: str, argument: float) -> list[float]:
        """What each replica answers; one that is gone answers nothing.

        Raises:
            HelmError: what a replica says.
            EngineUnavailableError: none answered.
        """
        answers = await ask_all(self._handle, method, argument)
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer.exception()
        if not answers:
            raise EngineUnavailableError("no replica answers")
        return answers

    def abandon(self, reason: str) -> None:
        """Withdraws all requests, whose callers get an error."""
        self.fail_pending(reason)

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error; no further one is asked elsewhere."""
        self._why_given_up = reason
        for asking in list(self._asking):
            asking.cancel()

    def end(self, reason: str) -> None:
        """Nothing more is expected of these replicas."""
        if self.is_alive:
            self.ended.set_result(reason)

    async def drain(self) -> None:
        """Waits until no request is in flight."""
        while self._asking:
            await asyncio.wait(list(self._asking))

    async def close(self) -> int:
        """Ends it for this front alone."""
        self.end("the server is shutting down")
        return 0


class RayEngines:
    """A place in the fleet for all replicas of one deployment."""

    def __init__(
        self, handle: DeploymentHandle[Any], user_key: bytes, start_seconds: float
    ) -> None:
        """Asks nobody yet.

        Args:
            handle: of a deployment of `ray_replica.EngineReplica`.
            user_key: keys the hashes of users, the same for all fronts.
            start_seconds: how long `start` waits for the first replica.
        """
        self.name = "ray"
        self.num_restarts = 0
        """Replicas that went and were replaced."""
        self.num_reloads = 0
        self.model_name = ""
        self.is_leaving = False
        self.why_none = "no replica is ready"
        self._handle = handle
        self._user_key = user_key
        self._start_seconds = start_seconds
        self._engine: Engine | None = None
        self._client: RayClient | None = None
        self._replicas: set[str] = set()
        self._looks: asyncio.Task[None] | None = None

    @property
    def current(self) -> Engine | None:
        """The engine that takes requests, or None."""
        return self._engine

    @property
    def clients(self) -> list[CoreClient]:
        """The replicas, as one."""
        return [] if self._client is None else [self._client]

    async def start(self) -> ServedModel:
        """Waits for the first replica.

        Raises:
            EngineUnavailableError: none was ready in time.
        """
        await asyncio.to_thread(load_routing_kernels)
        try:
            async with asyncio.timeout(self._start_seconds):
                while self._engine is None:
                    await self._look()
                    await asyncio.sleep(0.0 if self._engine else _LOOK_SECONDS / 4)
        except TimeoutError:
            raise EngineUnavailableError(self.why_none) from None
        self._looks = asyncio.create_task(self._keep_looking())
        return self._engine.served

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look()
            except Exception:
                logger.exception("the replicas could not be asked")

    async def _look(self) -> None:
        """Asks all replicas how they are, and what they serve where that is news."""
        reports: list[ReplicaReport] = await ask_all(self._handle, "report")
        if not reports:
            self._end("no replica is ready")
            return
        # While a new version rolls out, the one that most serve.
        versions = [report.version for report in reports]
        version = max(set(versions), key=versions.count)
        names = {report.replica for report in reports}
        self.num_restarts += len(self._replicas - names)
        self._replicas = names
        if self._engine is None or self._engine.served.version != version:
            await self._join(version)
        if self._client is None or self._engine is None:
            return
        self._client.note([report for report in reports if report.version == version])
        if self._engine.num_cores != self._client.num_replicas:
            self._engine = replace(self._engine, num_cores=self._client.num_replicas)

    async def _join(self, version: str) -> None:
        with contextlib.suppress(*_GONE, TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                served: ServedModel = await self._handle.describe.remote()
            if served.version != version:
                return  # Another replica answered; the next round asks again.
            self._end("another version has taken its place")
            self._client = RayClient(self._handle, served)
            self._engine = Engine(self._client, served, served.input_processor(self._user_key))
            self.model_name = served.name

    def _end(self, reason: str) -> None:
        self.why_none = reason
        if self._client is not None:
            self._client.end(reason)
        self._client = self._engine = None

    async def reload(self, model_dir: Path | None) -> ServedModel:
        """Refused: the replicas are Ray's."""
        raise ReloadError("under Ray a model is replaced by deploying the application again")

    async def settled(self) -> None:
        """Nothing to wait for."""

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of each pool; replicas that come later begin with their own."""
        if self._client is None:
            raise EngineUnavailableError(self.why_none)
        return await self._client.set_target(emb_fraction)

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""
        if self._client is not None:
            self._client.fail_pending(reason)

    async def close(self) -> bool:
        """Leaves the replicas, which Ray ends."""
        if self._looks is not None:
            self._looks.cancel()
        self._end("the server is shutting down")
        return True


async def ask_all(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """What the replicas answer to a call, in no order; those that are gone are left out."""
    try:
        response = handle.broadcast(method, *arguments)
        answers = await response.results_async(timeout_s=_ANSWER_SECONDS, return_exceptions=True)
    except (*_GONE, TimeoutError) as error:
        logger.debug("the replicas could not be asked: %s", error)
        return []
    for answer in answers:
        if isinstance(answer, Exception):
            logger.warning("a replica did not answer: %s", type(answer).__name__)
    return [answer for answer in answers if not isinstance(answer, BaseException)]

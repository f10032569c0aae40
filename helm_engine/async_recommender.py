"""The engine for asynchronous fronts: one coroutine call per request."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable

from helm_engine.clock import SystemClock
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.exceptions import (
    DeadlineExceededError,
    EngineUnavailableError,
)
from helm_engine.metrics import EngineMetrics
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import Recommendation, RecommendRequest
from helm_engine.request import Request
from helm_engine.request_trace.recorder import TraceRecorder


class AsyncRecommender:
    """Validates and hashes on the event loop; steps run in the engine core's process."""

    def __init__(self, supervisor: EngineSupervisor, recorder: TraceRecorder | None = None) -> None:
        """Takes the engine, and who writes down what it is asked, if anybody."""
        self.supervisor = supervisor
        self._recorder = recorder
        self.metrics = EngineMetrics(supervisor, recorder)
        self.clock = SystemClock()

    async def recommend(
        self,
        body: RecommendRequest,
        answer_id: str | None = None,
        arrived: float | None = None,
    ) -> Recommendation:
        """Answers one request.

        Args:
            body: the request.
            answer_id: `id` of the answer; one is made up by default.
            arrived: when the request came, by `clock`: deadlines and latencies count from there,
                reading and parsing included. Now by default.

        Raises:
            HelmError: what the client is to be told.
        """
        arrived = self.clock.now() if arrived is None else arrived
        request_id = f"rec-{uuid.uuid4().hex}"
        engine = self.supervisor.engine
        prepared = engine.processor.process(body, request_id, arrived)
        running = self._in_time(engine.client.submit(prepared.request))
        if self._recorder is not None:
            running = self._recorder.follow(running, prepared.request, engine.served)
        await running
        answer = build_recommendation(prepared, engine.served.name, answer_id or request_id)
        self.metrics.count_success(answer, self.clock.now() - arrived)
        return answer

    async def _in_time(self, running: Awaitable[Request]) -> Request:
        """Waits for a request, which is of no use to a client whose deadline has passed."""
        request = await running
        if self.clock.now() > request.deadline:
            raise DeadlineExceededError("the deadline passed before the answer was sent")
        return request

    async def forget_user(self, user: str) -> int:
        """Drops a user's KV from every engine; returns the number of blocks.

        Raises:
            EngineUnavailableError: no engine is ready.
        """
        tag = self.supervisor.engine.processor.user_tag(user)
        calls = [client.forget_user(tag) for client in self.supervisor.clients]
        counts = await asyncio.gather(*calls, return_exceptions=True)
        for failure in counts:
            # An engine that is gone took its KV along.
            if isinstance(failure, BaseException) and not isinstance(
                failure, EngineUnavailableError
            ):
                raise failure
        return sum(number for number in counts if isinstance(number, int))

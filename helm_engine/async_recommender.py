"""The engines for asynchronous fronts: one coroutine call per request."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable
from dataclasses import replace

from helm_engine.clock import SystemClock
from helm_engine.engine_fleet import EngineFleet
from helm_engine.exceptions import DeadlineExceededError
from helm_engine.metrics import EngineMetrics
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import Recommendation, RecommendRequest
from helm_engine.request import Request
from helm_engine.request_trace.recorder import TraceRecorder


class AsyncRecommender:
    """Validates and hashes on the event loop; steps run in processes of engine cores."""

    def __init__(self, fleet: EngineFleet, recorder: TraceRecorder | None = None) -> None:
        """Takes the engines, and who writes down what they are asked, if anybody."""
        self.fleet = fleet
        self._recorder = recorder
        self.metrics = EngineMetrics(fleet, recorder)
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
        engine = self.fleet.model_for(body)
        prepared = engine.processor.process(body, request_id, arrived)
        running = self._in_time(self.fleet.submit(prepared.request, engine))
        if self._recorder is not None:
            running = self._recorder.follow(running, prepared.request, engine.served)
        ended = await running
        if ended is not prepared.request:
            prepared = replace(prepared, request=ended)
        answer = build_recommendation(prepared, engine.served.name, answer_id or request_id)
        self.metrics.count_success(answer, self.clock.now() - arrived)
        return answer

    async def _in_time(self, running: Awaitable[Request]) -> Request:
        """Waits for a request, which is of no use to a client whose deadline has passed."""
        request = await running
        if self.clock.now() > request.deadline:
            raise DeadlineExceededError("the deadline passed before the answer was sent")
        return request

"""The engine for asynchronous fronts: one coroutine call per request."""

from __future__ import annotations

import asyncio
import uuid

from helm_engine.clock import Clock
from helm_engine.engine_client import InProcessEngineClient
from helm_engine.engine_loader import LoadedEngine
from helm_engine.exceptions import HelmError, RequestAbortedError
from helm_engine.metrics import EngineMetrics
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import Recommendation, RecommendRequest


class AsyncRecommender:
    """Validates and hashes on the event loop, runs steps on the engine's thread."""

    def __init__(self, engine: LoadedEngine, clock: Clock) -> None:
        """Takes a loaded engine and its clock; must be made inside a running event loop."""
        self.metrics = EngineMetrics(engine.core.scheduler, engine.config.model_name)
        self._model_name = engine.config.model_name
        self._processor = engine.processor
        self._clock = clock
        self._client = InProcessEngineClient(engine.core, asyncio.get_running_loop())

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be answered."""
        return self._client.is_alive

    async def recommend(self, body: RecommendRequest) -> Recommendation:
        """Answers one request.

        Raises:
            HelmError: what the client is to be told.
        """
        arrived = self._clock.now()
        try:
            prepared = self._processor.process(body, f"rec-{uuid.uuid4().hex}", arrived)
            await self._client.submit(prepared.request)
            answer = build_recommendation(prepared, self._model_name)
        except asyncio.CancelledError:
            self.metrics.count_failure(RequestAbortedError("the request was withdrawn"))
            raise
        except HelmError as error:
            self.metrics.count_failure(error)
            raise
        self.metrics.count_success(answer.usage, self._clock.now() - arrived)
        return answer

    def give_up(self) -> None:
        """Answers all waiting clients with an error: the server can wait no longer."""
        self._client.fail_pending("the server is shutting down")

    def close(self) -> None:
        """Stops the engine's thread."""
        self._client.close()

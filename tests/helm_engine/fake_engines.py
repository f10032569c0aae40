"""Members of a fleet without processes: each answers, waits or fails as a test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import EngineUnavailableError, HelmError
from helm_engine.fleet_member import CoreClient, Engine
from helm_engine.input_processor import new_user_key
from helm_engine.request import Request, RequestStatus
from helm_engine.served_model import ServedModel

USER_KEY = new_user_key()


class FakeClient:
    """An engine core: it keeps requests until the test lets it answer, unless it answers itself."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.pid = None
        self.answers = True
        self.error: HelmError | None = None
        """Every request gets it."""
        self.silent_for = 0.0
        self.received: list[str] = []
        self.withdrawn: list[str] = []
        self.waiting: dict[str, tuple[Request, asyncio.Future[Request]]] = {}

    @property
    def is_alive(self) -> bool:
        return not self.ended.done()

    @property
    def num_in_flight(self) -> int:
        return len(self.waiting)

    def silence(self) -> float:
        return self.silent_for

    async def submit(self, request: Request) -> Request:
        if not self.is_alive:
            raise EngineUnavailableError(self.ended.result())
        self.received.append(request.request_id)
        if self.error is not None:
            raise self.error
        future: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        self.waiting[request.request_id] = (request, future)
        if self.answers:
            self.answer(request.request_id)
        try:
            await asyncio.sleep(0)  # Nobody answers within the same turn of the loop.
            return await future
        except asyncio.CancelledError:
            self.withdrawn.append(request.request_id)
            raise
        finally:
            self.waiting.pop(request.request_id, None)

    def answer(self, request_id: str) -> None:
        """Ends a request with scores."""
        request, future = self.waiting[request_id]
        if not future.done():
            number = max(1, request.num_candidates)
            request.scores = np.zeros((number, 1), dtype=np.float32)
            request.status, request.own_ms = RequestStatus.FINISHED, 1.0
            future.set_result(request)

    def die(self, reason: str = "it died") -> None:
        """All that wait are told, as `EngineClient` does."""
        self.ended.set_result(reason)
        self.fail_pending(reason)

    async def forget_user(self, user_tag: int) -> int:
        return user_tag

    async def set_target(self, emb_fraction: float) -> float:
        return emb_fraction

    def abandon(self, reason: str) -> None:
        self.withdrawn += self.waiting
        self.fail_pending(reason)

    def fail_pending(self, reason: str) -> None:
        for _, future in self.waiting.values():
            if not future.done():
                future.set_exception(EngineUnavailableError(reason))

    async def drain(self) -> None:
        while self.waiting:
            await asyncio.sleep(0)

    async def close(self) -> int:
        return 0


class FakeMember:
    """A place in a fleet whose engines come and go as the test says."""

    def __init__(self, name: str, served: ServedModel) -> None:
        self.name = name
        self.model_name = served.name
        self.served = served
        self.num_restarts = self.num_reloads = 0
        self.is_leaving = False
        self.why_none = f"{name} is starting"
        self.client = FakeClient()
        self.reload_to: Callable[[], ServedModel] = lambda: self.served
        self._engine: Engine | None = None

    @property
    def current(self) -> Engine | None:
        engine = self._engine
        return engine if engine is not None and engine.client.is_alive else None

    @property
    def clients(self) -> list[CoreClient]:
        return [] if self._engine is None else [self._engine.client]

    async def start(self) -> ServedModel:
        self.come()
        return self.served

    def come(self, served: ServedModel | None = None) -> FakeClient:
        """Another engine is ready."""
        self.served = served or self.served
        self.client = FakeClient()
        self._engine = Engine(self.client, self.served, self.served.input_processor(USER_KEY))
        return self.client

    async def reload(self, model_dir: Path | None) -> ServedModel:
        await asyncio.sleep(0)
        self.come(self.reload_to())
        self.num_reloads += 1
        return self.served

    async def settled(self) -> None:
        await asyncio.sleep(0)

    async def set_target(self, emb_fraction: float) -> float:
        return await self.client.set_target(emb_fraction)

    def fail_pending(self, reason: str) -> None:
        self.client.fail_pending(reason)

    async def close(self) -> bool:
        if self.client.is_alive:
            self.client.die("the server is shutting down")
        return True


def of_version(served: ServedModel, version: str) -> ServedModel:
    """The same model with other weights."""
    return replace(served, version=version)

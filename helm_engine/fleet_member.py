"""What a front needs of an engine, whether it is a process of its own or on another host."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helm_engine.engine_stats import EngineStats
from helm_engine.input_processor import InputProcessor
from helm_engine.request import Request
from helm_engine.served_model import ServedModel


class CoreClient(Protocol):
    """One engine core as long as it lives; the next one is another client."""

    @property
    def stats(self) -> EngineStats:
        """As last reported."""

    @property
    def ended(self) -> asyncio.Future[str]:
        """Set, with the reason, once nothing more is expected of the core."""

    @property
    def is_alive(self) -> bool:
        """Whether requests can be given to the core."""

    @property
    def num_in_flight(self) -> int:
        """Requests of this front that wait for their end."""

    @property
    def pid(self) -> int | None:
        """The core's process, where it is a child of this one."""

    def silence(self) -> float:
        """Seconds since the core's process last showed that it runs."""

    async def submit(self, request: Request) -> Request:
        """Runs one request to its end; see `EngineClient.submit`."""

    async def forget_user(self, user_tag: int) -> int:
        """Drops a user's KV; returns the number of blocks."""

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool; returns the share that will be reached."""

    def abandon(self, reason: str) -> None:
        """Withdraws all requests, whose callers get an error and may ask another engine."""

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""

    async def drain(self) -> None:
        """Waits until no request is in flight."""

    async def close(self) -> int:
        """Ends it; returns an exit status."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that is ready, until it ends or is replaced."""

    client: CoreClient
    served: ServedModel
    processor: InputProcessor
    num_cores: int = 1
    """Engine cores that are asked through this client, each with a queue of its own."""


class FleetMember(Protocol):
    """Keeps one engine of a fleet there: starts it or reaches it, and again when it is gone."""

    name: str
    """Label of its metrics, and its name in routes."""
    num_restarts: int
    """Engines that died, hung or were lost, and came back."""
    num_reloads: int

    @property
    def model_name(self) -> str:
        """The name of its model; empty where it is not known yet."""

    @property
    def current(self) -> Engine | None:
        """The engine that takes requests, or None."""

    @property
    def is_leaving(self) -> bool:
        """Whether it asks for no further requests: it is about to stop."""

    @property
    def why_none(self) -> str:
        """Why there is none."""

    @property
    def clients(self) -> list[CoreClient]:
        """All cores that hold users' KV."""

    async def start(self) -> ServedModel | None:
        """Starts the first engine, or reaches it; None = not yet, it is tried further."""

    async def reload(self, model_dir: Path | None) -> ServedModel:
        """Puts a model in the place of the one served; see `EngineSupervisor.reload`."""

    async def settled(self) -> None:
        """Waits until engines that were replaced have finished their last."""

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool, also of engines that follow."""

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""

    async def close(self) -> bool:
        """Ends it; whether the books of each engine were in order."""

"""A front over fake engines, and a time that tests set."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from helm_engine.async_recommender import AsyncRecommender
from helm_engine.clock import Clock, SystemClock
from helm_engine.config import FleetConfig
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_loader import load_engine
from helm_engine.protocol import Recommendation, parse_request
from helm_engine.served_model import ServedModel
from tests.helm_engine.fake_engines import FakeMember
from tests.toy_models import toy_config, toy_engine_config, write_toy_model


def toy_served(directory: Path) -> ServedModel:
    """What a front knows of an engine with a toy model, which is written there."""
    model_dir = write_toy_model(directory / "toy", toy_config())
    engine = load_engine(toy_engine_config(model_dir), SystemClock())
    engine.close()
    return engine.served


class SetClock(Clock):
    """Shows the time that a test sets."""

    seconds = 100.0

    def now(self) -> float:
        return self.seconds


class Front:
    """A fleet and the recommender over it."""

    def __init__(self, served: ServedModel, number: int = 2, **config: object) -> None:
        self.members = [FakeMember(str(place), served) for place in range(number)]
        self.clock = SetClock()
        fleet = FleetConfig(num_engines=number, **config)  # type: ignore[arg-type]
        self.fleet = EngineFleet(self.members, fleet, seed=1, clock=self.clock)
        self.recommender = AsyncRecommender(self.fleet)
        self.recommender.clock = self.clock  # type: ignore[assignment]

    async def ask(self, user: str | None = "ada", **fields: object) -> Recommendation:
        body = {
            "history": {"item_ids": list(range(1, 9)), "timestamps": list(range(8))},
            "candidates": {"item_ids": [5, 6, 7]},
        }
        return await self.recommender.recommend(parse_request({**body, "user": user, **fields}))

    def holder(self) -> FakeMember:
        """The one member that has a request."""
        (found,) = [member for member in self.members if member.client.waiting]
        return found

    def other(self, than: FakeMember) -> FakeMember:
        return next(member for member in self.members if member is not than)


def run(front: Callable[[], Front], scenario: Callable[[Front], Awaitable[None]]) -> None:
    async def whole() -> None:
        made = front()
        await made.fleet.start()
        try:
            await scenario(made)
        finally:
            await made.fleet.close()

    asyncio.run(asyncio.wait_for(whole(), 60.0))


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def hold(front: Front) -> None:
    for member in front.members:
        member.client.answers = False

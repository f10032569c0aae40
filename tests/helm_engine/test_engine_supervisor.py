"""The supervisor over real processes: restarts, reloads, and what is asked meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from helm_engine.async_recommender import AsyncRecommender
from helm_engine.config import EngineConfig
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.exceptions import EngineUnavailableError, HelmError, ReloadError
from helm_engine.protocol import Recommendation, parse_request
from helm_engine.recommender import Recommender
from model_executor.exceptions import ModelDirectoryError
from tests.helm_engine.held_core import Hold, held_client
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

WAIT_SECONDS = 60.0
BODY = {
    "user": "ada",
    "history": {"item_ids": list(range(1, 21)), "timestamps": list(range(20))},
    "candidates": {"item_ids": [5, 6, 7]},
}


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """A toy model."""
    return toy_engine_config(write_toy_model(tmp_path / "toy", toy_config()))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model, by its weights, under another name."""
    return write_toy_model(tmp_path / "other", toy_config(), seed=99)


class Front:
    """A supervisor and the recommender over it."""

    def __init__(self, config: EngineConfig) -> None:
        self.supervisor = EngineSupervisor(config, lambda one: held_client(one, hang_seconds=30))
        self.recommender = AsyncRecommender(EngineFleet([self.supervisor]))

    async def ask(self) -> Recommendation:
        return await self.recommender.recommend(parse_request(BODY))

    async def until_ready(self) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not self.supervisor.is_ready:
                await asyncio.sleep(0.02)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.supervisor.engine.client.pid
        assert pid is not None
        os.kill(pid, number)


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[Front]:
    front = Front(config)
    await front.supervisor.start()
    try:
        yield front
    finally:
        Hold(config.model_dir).release()
        await front.supervisor.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT_SECONDS))


def scores_of(config: EngineConfig, model_dir: Path | None = None) -> list[float]:
    model = toy_engine_config(model_dir) if model_dir else config
    return [item.score for item in Recommender.from_config(model).recommend(BODY).data]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_core_that_died_is_replaced_and_answers_as_before(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with running(config) as front:
            before = await front.ask()
            for restarts in (1, 2):
                front.kill()
                await until(lambda: not front.supervisor.is_ready)
                with pytest.raises(EngineUnavailableError):
                    await front.ask()
                await front.until_ready()
                assert front.supervisor.num_restarts == restarts
                after = await front.ask()
                assert after.usage.cached_tokens == 0
                assert after.data == before.data
            metrics = front.recommender.metrics.render().decode()
            counted = 'helm:engine_restarts_total{engine="0",model_name="toy"} 2.0'
            assert counted in metrics
            assert await front.supervisor.close()

    run(scenario)


def test_a_core_that_cannot_be_restarted_is_tried_until_it_can(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helm_engine.engine_supervisor.FIRST_PAUSE_SECONDS", 0.05)

    async def scenario() -> None:
        async with running(config) as front:
            before = (await front.ask()).data
            settings = config.model_dir / "config.json"
            whole = settings.read_text(encoding="utf-8")
            settings.write_text("{}", encoding="utf-8")
            front.kill()

            async def says_why() -> bool:
                try:
                    await front.ask()
                except EngineUnavailableError as error:
                    return "could not be started" in str(error)
                return False

            async with asyncio.timeout(WAIT_SECONDS):
                while not await says_why():
                    await asyncio.sleep(0.02)
            settings.write_text(whole, encoding="utf-8")
            await front.until_ready()
            assert (await front.ask()).data == before

    run(scenario)


def test_the_first_start_fails_with_the_reason(config: EngineConfig) -> None:
    (config.model_dir / "model.safetensors").unlink()

    async def scenario() -> None:
        front = Front(config)
        with pytest.raises(ModelDirectoryError, match=r"model\.safetensors"):
            await front.supervisor.start()
        assert not front.supervisor.is_ready
        assert await front.supervisor.close()

    run(scenario)


def test_requests_in_flight_end_on_the_model_they_began_on(
    config: EngineConfig, other: Path
) -> None:
    old, new = scores_of(config), scores_of(config, other)
    assert old != pytest.approx(new, abs=1e-4)

    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config) as front:
            hold.hold()
            in_flight = asyncio.create_task(front.ask())
            await until(lambda: hold.has_begun)
            served = await front.supervisor.reload(other)
            assert (served.name, front.supervisor.num_reloads) == ("other", 1)
            after = await front.ask()
            assert not in_flight.done()
            assert len(front.supervisor.clients) == 2
            forgotten = asyncio.create_task(front.recommender.fleet.forget_user("ada"))
            await asyncio.sleep(0.05)
            hold.release()
            before = await in_flight
            assert await forgotten > 0
            assert (before.model, after.model) == ("toy", "other")
            assert [item.score for item in before.data] == pytest.approx(old, rel=1e-5)
            assert [item.score for item in after.data] == pytest.approx(new, rel=1e-5)
            await until(lambda: len(front.supervisor.clients) == 1)
            assert (await front.ask()).usage.cached_tokens == 0, "ada was forgotten everywhere"
            # What is restarted from now on is the new model.
            front.kill()
            await until(lambda: not front.supervisor.is_ready)
            await front.until_ready()
            assert (await front.ask()).model == "other"

    run(scenario)


def test_a_model_that_cannot_be_served_replaces_nothing(config: EngineConfig, other: Path) -> None:
    (other / "tables.safetensors").write_bytes(b"broken")

    async def scenario() -> None:
        async with running(config) as front:
            before = (await front.ask()).data
            for directory in (other, other / "missing"):
                with pytest.raises(ReloadError, match="was not replaced"):
                    await front.supervisor.reload(directory)
            assert (await front.ask()).data == before
            assert front.supervisor.num_reloads == 0

    run(scenario)


def test_an_engine_that_does_not_become_ready_is_given_up(config: EngineConfig) -> None:
    async def scenario() -> None:
        supervisor = EngineSupervisor(config, held_client, start_seconds=0.05)
        with pytest.raises(EngineUnavailableError, match="start_timeout"):
            await supervisor.start()
        assert await supervisor.close()

    run(scenario)


def test_an_engine_that_warms_up_while_all_ends_is_ended_too(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with running(config) as front:
            reloading = asyncio.create_task(front.supervisor.reload(None))
            await asyncio.sleep(0.2)
            assert await front.supervisor.close()
            with pytest.raises(EngineUnavailableError):
                await reloading
            with pytest.raises(EngineUnavailableError):
                await front.supervisor.reload(None)
            assert not front.supervisor.is_ready

    run(scenario)


def test_one_reload_at_a_time(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with running(config) as front:
            outcomes = await asyncio.gather(
                *(front.supervisor.reload(None) for _ in range(3)), return_exceptions=True
            )
            assert sum(isinstance(outcome, ReloadError) for outcome in outcomes) == 2

    run(scenario)


def test_reloading_the_same_directory_reads_what_is_in_it_now(
    config: EngineConfig, other: Path
) -> None:
    new = scores_of(config, other)

    async def scenario() -> None:
        async with running(config) as front:
            first = front.supervisor.engine.served.version
            staged = config.model_dir.with_name("staged")
            shutil.copytree(other, staged)
            config.model_dir.rename(config.model_dir.with_name("before"))
            staged.rename(config.model_dir)
            served = await front.supervisor.reload(None)
            assert served.version != first
            answer = await front.ask()
            assert [item.score for item in answer.data] == pytest.approx(new, rel=1e-5)

    run(scenario)


def test_a_core_may_die_while_its_successor_warms_up(config: EngineConfig, other: Path) -> None:
    async def scenario() -> None:
        async with running(config) as front:
            reloading = asyncio.create_task(front.supervisor.reload(other))
            await asyncio.sleep(0.1)
            front.kill()
            served = await reloading
            assert served.name == "other"
            await front.until_ready()
            answers = []
            for _ in range(20):
                answers.append(await front.ask())
                await asyncio.sleep(0.02)
            assert {answer.model for answer in answers} == {"other"}
            assert front.supervisor.num_reloads == 1

    run(scenario)


def test_closing_tells_those_who_wait(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config) as front:
            hold.hold()
            waiting = asyncio.create_task(front.ask())
            await until(lambda: hold.has_begun)
            closing = asyncio.create_task(front.supervisor.close())
            with pytest.raises(HelmError):
                await waiting
            hold.release()
            assert await closing
            with pytest.raises(EngineUnavailableError):
                await front.ask()

    run(scenario)


def test_what_is_served_is_told_in_json(config: EngineConfig) -> None:
    """`/info` and `/v1/models` are made of it."""
    from dataclasses import asdict

    async def scenario() -> None:
        async with running(config) as front:
            served = front.supervisor.engine.served
            json.dumps([asdict(served.layout), asdict(served.memory)])
            json.dumps(served.model_config.model_dump())
            assert served.memory.pages == served.layout.num_pages * served.layout.page_bytes

    run(scenario)


def test_a_split_that_is_asked_for_during_a_reload_outlives_it(
    config: EngineConfig, other: Path
) -> None:
    async def scenario() -> None:
        async with running(config) as front:
            reloading = asyncio.create_task(front.supervisor.reload(other))
            await asyncio.sleep(0.05)
            share = await front.supervisor.set_target(0.4)
            assert not reloading.done()
            await reloading
            stats = front.supervisor.engine.client.stats
            assert stats.emb_fraction_target == 0.4
            # And a core that is started anew begins there.
            front.kill()
            await until(lambda: not front.supervisor.is_ready)
            await front.until_ready()
            client = front.supervisor.engine.client
            await until(lambda: client.stats.emb_fraction_committed == pytest.approx(share))

    run(scenario)

"""An engine core in a real process, seen from an event loop: answers, withdrawals, its death."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from helm_engine.config import EngineConfig
from helm_engine.engine_client import EngineClient
from helm_engine.exceptions import (
    DeadlineExceededError,
    EngineUnavailableError,
    QueueFullError,
    StepFailedError,
)
from helm_engine.input_processor import PreparedRequest, new_user_key
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import parse_request
from helm_engine.recommender import Recommender
from helm_engine.served_model import ServedModel
from model_executor.exceptions import ModelDirectoryError
from tests.helm_engine.held_core import Hold, held_client
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

WAIT_SECONDS = 60.0
LIMITS = {"max_num_seqs": 2, "max_num_waiting": 3, "max_num_batched_tokens": 24}


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """A toy model under small limits."""
    return toy_engine_config(write_toy_model(tmp_path / "toy", toy_config()), **LIMITS)


def body(user: str, length: int = 20) -> dict[str, object]:
    history = {"item_ids": [1 + n % 60 for n in range(length)], "timestamps": list(range(length))}
    return {"user": user, "history": history, "candidates": {"item_ids": [5, 6, 7]}}


class Front:
    """A client, and requests for its engine."""

    def __init__(self, client: EngineClient, served: ServedModel) -> None:
        self.client = client
        self.processor = served.input_processor(new_user_key())
        self._number = 0

    def prepare(self, user: str, length: int = 20) -> PreparedRequest:
        self._number += 1
        asked = parse_request(body(user, length))
        return self.processor.process(asked, f"r{self._number}", 0.0)

    def ask(self, user: str) -> asyncio.Task[object]:
        return asyncio.create_task(self.client.submit(self.prepare(user).request))


@asynccontextmanager
async def running(config: EngineConfig, hang_seconds: float = 60.0) -> AsyncIterator[Front]:
    client = held_client(config, hang_seconds)
    try:
        yield Front(client, await client.ready())
    finally:
        Hold(config.model_dir).release()
        await client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT_SECONDS))


def test_requests_are_answered_as_in_one_process(config: EngineConfig) -> None:
    wanted = [Recommender.from_config(config).recommend(body(f"u{n}", 5 + n)) for n in range(4)]

    async def scenario() -> None:
        async with running(config) as front:
            prepared = [front.prepare(f"u{n}", 5 + n) for n in range(4)]
            await asyncio.gather(*(front.client.submit(one.request) for one in prepared))
            for one, expected in zip(prepared, wanted, strict=True):
                answer = build_recommendation(one, "toy")
                assert [item.item_id for item in answer.data] == [
                    item.item_id for item in expected.data
                ]
                np.testing.assert_allclose(
                    [item.score for item in answer.data],
                    [item.score for item in expected.data],
                    rtol=1e-5,
                )
            again = front.prepare("u3", 8)
            await front.client.submit(again.request)
            assert again.request.cached_tokens > 0
            await until(lambda: front.client.stats.prefix_hits == again.request.cached_tokens)
            assert await front.client.close() == 0

    run(scenario)


def test_a_withdrawn_request_frees_its_blocks(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config) as front:
            hold.hold()
            gone = front.ask("gone")
            await until(lambda: hold.has_begun)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            hold.release()
            await front.ask("next")
            await until(lambda: front.client.stats.num_requests_running == 0)
            assert front.client.stats.kv_cache_usage == 0.0
            assert front.client.num_in_flight == 0

    run(scenario)


def test_a_full_queue_is_told_to_those_who_came_too_late(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config) as front:
            hold.hold()
            first = front.ask("first")
            await until(lambda: hold.has_begun)
            rest = [front.ask(f"u{n}") for n in range(7)]
            await asyncio.sleep(0.05)
            hold.release()
            outcomes = await asyncio.gather(*rest, return_exceptions=True)
            # When they come in the first has ended: two may run and three may wait.
            assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == 2
            await first

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_when_the_core_dies_or_hangs_its_clients_are_told(
    config: EngineConfig, number: signal.Signals
) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config, hang_seconds=1.0) as front:
            hold.hold()
            waiting = [front.ask(f"u{n}") for n in range(3)]
            await until(lambda: hold.has_begun)
            assert front.client.pid is not None
            os.kill(front.client.pid, number)
            for task in waiting:
                with pytest.raises(EngineUnavailableError):
                    await task
            assert not front.client.is_alive
            with pytest.raises(EngineUnavailableError):
                await front.ask("later")
            with pytest.raises(EngineUnavailableError):
                await front.client.forget_user(5)
            assert await front.client.close() == -signal.SIGKILL

    run(scenario)


def test_a_core_that_waits_is_not_taken_for_one_that_hangs(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with running(config, hang_seconds=1.0) as front:
            heard = front.client.stats
            await asyncio.sleep(3.0)
            assert front.client.is_alive
            assert front.client.stats is not heard, "no heartbeat came"

    run(scenario)


def test_a_front_that_slept_does_not_blame_the_core(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with running(config, hang_seconds=1.0) as front:
            time.sleep(2.5)
            await asyncio.sleep(0.5)
            assert front.client.is_alive

    run(scenario)


def test_a_deadline_is_kept_though_the_core_is_busy(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config) as front:
            hold.hold()
            first = front.ask("first")
            await until(lambda: hold.has_begun)
            late = front.prepare("late").request
            late.deadline = time.monotonic() + 0.1
            with pytest.raises(DeadlineExceededError):
                await front.client.submit(late)
            assert front.client.num_in_flight == 1
            hold.release()
            await first
            await until(lambda: front.client.stats.num_requests_waiting == 0)

    run(scenario)


def test_a_core_whose_every_step_fails_gives_up(config: EngineConfig) -> None:
    async def scenario() -> None:
        config.model_dir.with_suffix(".break").touch()
        async with running(config) as front:
            failures: list[type[BaseException]] = []
            while front.client.is_alive:
                with pytest.raises((StepFailedError, EngineUnavailableError)) as failure:
                    await front.ask(f"u{len(failures)}")
                failures.append(failure.type)
            assert failures.count(StepFailedError) >= 10
            assert "ended" in front.client.ended.result()

    run(scenario)


def test_what_could_not_be_started_leaves_nothing_behind(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 120)  # Too long for the address of a socket.
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))

    async def scenario() -> None:
        files = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            with pytest.raises(zmq.ZMQError):
                held_client(config)
        assert list(deep.iterdir()) == []
        assert len(list(Path("/proc/self/fd").iterdir())) <= files

    run(scenario)


def test_why_a_model_cannot_be_loaded_is_said_as_in_one_process(config: EngineConfig) -> None:
    (config.model_dir / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelDirectoryError) as in_process:
        Recommender.from_config(config)

    async def scenario() -> None:
        client = held_client(config)
        with pytest.raises(ModelDirectoryError) as told:
            await client.ready()
        assert str(told.value) == str(in_process.value)
        await client.close()

    run(scenario)


def test_a_forgotten_user_meets_no_kv_and_leaves_none(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with running(config) as front:

            async def visit(user: str) -> int:
                request = front.prepare(user).request
                await front.client.submit(request)
                return request.cached_tokens

            forget = front.client.forget_user
            tag = front.processor.user_tag("ada")
            assert [await visit("ada"), await visit("bob")] == [0, 0]
            blocks = await visit("ada") // config.pool.block_tokens
            assert await forget(tag) >= blocks > 0
            assert await forget(tag) == 0
            assert await visit("bob") > 0, "another user was forgotten too"
            hold.hold()
            running_visit = asyncio.create_task(visit("ada"))
            await until(lambda: hold.has_begun)
            forgotten = asyncio.create_task(forget(tag))
            await asyncio.sleep(0.05)
            hold.release()
            assert await running_visit == 0
            await forgotten
            await until(lambda: front.client.stats.num_requests_running == 0)

    run(scenario)

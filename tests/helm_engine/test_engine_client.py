"""The engine's thread seen from an event loop: answers, withdrawals, and its death."""

from __future__ import annotations

import asyncio
import threading

import pytest

from helm_engine.config import SchedulerConfig
from helm_engine.engine_client import InProcessEngineClient
from helm_engine.exceptions import EngineUnavailableError, QueueFullError
from helm_engine.request import RequestStatus
from model_executor.step import ModelOutput, SchedulerOutput
from tests.helm_engine.test_scheduler import Simulation, make_request


def test_requests_submitted_together_are_all_answered() -> None:
    async def scenario() -> None:
        simulation = Simulation()
        client = InProcessEngineClient(simulation.core, asyncio.get_running_loop())
        requests = [make_request(f"r{n}", 30, user=f"u{n % 3}") for n in range(40)]
        ended = await asyncio.gather(*map(client.submit, requests))
        assert [request.status for request in ended] == [RequestStatus.FINISHED] * 40
        client.close()
        simulation.core.check_integrity()

    asyncio.run(scenario())


def _hold_first_step(simulation: Simulation) -> tuple[threading.Event, threading.Event]:
    """Makes the first step wait; returns (it has begun, let it go on)."""
    begun, go_on = threading.Event(), threading.Event()
    execute = simulation.executor.execute

    def held(step: SchedulerOutput) -> ModelOutput:
        begun.set()
        assert go_on.wait(30)
        return execute(step)

    simulation.executor.execute = held  # type: ignore[method-assign]
    return begun, go_on


def test_a_withdrawn_request_frees_its_blocks() -> None:
    async def scenario() -> None:
        simulation = Simulation(SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=2))
        begun, go_on = _hold_first_step(simulation)
        client = InProcessEngineClient(simulation.core, asyncio.get_running_loop())
        task = asyncio.create_task(client.submit(make_request("gone", 300)))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert (await client.submit(make_request("next", 10))).status is RequestStatus.FINISHED
        client.close()
        pool = simulation.scheduler.kv.pool
        assert pool.num_held_blocks == 0

    asyncio.run(scenario())


def test_a_full_queue_is_told_to_the_one_who_came_too_late() -> None:
    async def scenario() -> None:
        limits = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=1, max_num_waiting=1)
        simulation = Simulation(limits)
        begun, go_on = _hold_first_step(simulation)
        client = InProcessEngineClient(simulation.core, asyncio.get_running_loop())
        first = asyncio.create_task(client.submit(make_request("first", 300)))
        await asyncio.to_thread(begun.wait, 30)
        rest = [asyncio.create_task(client.submit(make_request(f"r{n}"))) for n in range(3)]
        await asyncio.sleep(0)
        go_on.set()
        outcomes = await asyncio.gather(*rest, return_exceptions=True)
        assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == 2
        assert (await first).status is RequestStatus.FINISHED
        client.close()

    asyncio.run(scenario())


def test_when_the_engine_dies_its_clients_are_told_at_once() -> None:
    async def scenario() -> None:
        simulation = Simulation()

        def broken(now: float) -> SchedulerOutput:
            raise RuntimeError("a bug")

        simulation.scheduler.schedule = broken  # type: ignore[method-assign]
        client = InProcessEngineClient(simulation.core, asyncio.get_running_loop())
        with pytest.raises(EngineUnavailableError):
            await client.submit(make_request("doomed"))
        assert not client.is_alive
        with pytest.raises(EngineUnavailableError):
            await client.submit(make_request("later"))
        client.close()

    asyncio.run(scenario())

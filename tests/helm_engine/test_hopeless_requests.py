"""Work that cannot be in time any more is not begun; in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from helm_engine.async_recommender import AsyncRecommender
from helm_engine.config import SchedulerConfig
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.exceptions import DeadlineExceededError, QueueFullError, RequestAbortedError
from helm_engine.protocol import parse_request
from helm_engine.request import Request, RequestStatus
from helm_engine.step_times import StepTimes
from tests.helm_engine.held_core import Hold, held_client
from tests.helm_engine.test_scheduler import Simulation, make_request
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

CONFIG = SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=8, max_num_waiting=400)
DEADLINE = 0.05


def scheduled(simulation: Simulation) -> set[str]:
    return {one.request_id for step in simulation.executor.steps for one in step.requests}


def test_nine_of_ten_of_the_latest_steps_are_within_what_is_expected() -> None:
    times = StepTimes()
    assert times.expected == 0.0
    for seconds in [900.0] * 20 + list(range(1, 17)):
        times.begin(100.0)
        times.end(100.0 + seconds)
    assert times.expected == pytest.approx(14.0)
    times.forget()
    assert times.expected == 0.0


class Busy(Simulation):
    """Has made five steps, each longer by `more_seconds`, and has as much again to do."""

    def __init__(self, more_seconds: float = 0.0) -> None:
        super().__init__(CONFIG)
        self.work = [make_request(f"busy{number}", 246) for number in range(10)]
        for request in self.work:
            self.core.add_request(request)
        for _ in range(5):
            step = self.scheduler.schedule(self.clock.now())
            assert step is not None
            output = self.executor.execute(step)
            self.clock.advance(more_seconds)
            self.scheduler.update(step, output, self.clock.now())


def ask(simulation: Simulation, name: str, length: int, seconds: float) -> Request:
    """A request that is due so many seconds from now."""
    now = simulation.clock.now()
    request = make_request(name, length, arrival=now, deadline=now + seconds)
    simulation.core.add_request(request)
    return request


def test_a_request_that_the_next_step_cannot_finish_in_time_is_not_begun() -> None:
    simulation = Busy()
    step_seconds = simulation.clock.now() / 5
    near = ask(simulation, "near", 100, 0.9 * step_seconds)
    far = ask(simulation, "far", 100, 1.5 * step_seconds)
    simulation.drain()
    assert isinstance(near.error, DeadlineExceededError)
    assert far.status is RequestStatus.FINISHED
    assert "near" not in scheduled(simulation)


def test_what_does_not_fit_into_the_step_needs_two() -> None:
    simulation = Busy()
    step_seconds = simulation.clock.now() / 5
    first = ask(simulation, "first", 200, 1.5 * step_seconds)
    split = ask(simulation, "split", 200, 1.6 * step_seconds)
    simulation.drain()
    assert first.status is RequestStatus.FINISHED
    assert isinstance(split.error, DeadlineExceededError)
    assert "split" not in scheduled(simulation)


def test_an_engine_that_was_idle_expects_nothing() -> None:
    simulation = Busy(more_seconds=100.0)
    simulation.drain()
    several = [ask(simulation, f"r{number}", 20, 1.0) for number in range(4)]
    simulation.drain()
    assert {request.status for request in several} == {RequestStatus.FINISHED}


def test_one_is_tried_where_the_estimate_would_leave_nothing_to_run() -> None:
    simulation = Busy(more_seconds=100.0)
    several = [ask(simulation, f"r{number}", 20, 1.0 + number) for number in range(4)]
    for request in simulation.work:
        simulation.core.fail_request(request, RequestAbortedError("withdrawn"))
    simulation.drain()
    assert [request.status is RequestStatus.FINISHED for request in several] == [
        *[False] * 3,
        True,
    ]


def test_an_engine_that_is_idle_forgets_how_long_steps_took() -> None:
    simulation = Busy(more_seconds=100.0)
    for request in simulation.work:
        simulation.core.fail_request(request, RequestAbortedError("withdrawn"))
    several = [ask(simulation, f"r{number}", 20, 1.0 + number) for number in range(4)]
    simulation.drain()
    assert {request.status for request in several} == {RequestStatus.FINISHED}


def test_what_has_no_deadline_is_never_hopeless() -> None:
    simulation = Simulation(CONFIG)
    requests = [make_request(f"r{number}", 200) for number in range(50)]
    for request in requests:
        simulation.core.add_request(request)
    simulation.drain()
    assert {request.status for request in requests} == {RequestStatus.FINISHED}


def answered_in_time(rate: float, seconds: float = 10.0) -> int:
    """Poisson arrivals with one deadline for all, at a queue far longer than it allows."""
    simulation = Simulation(CONFIG)
    rng = np.random.default_rng(3)
    arrivals = np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds))).tolist()
    good = 0

    def step() -> int:
        ended: list[Request] = simulation.core.step()
        done = [one for one in ended if one.status is RequestStatus.FINISHED]
        return sum(one.finished_at <= one.deadline for one in done)

    for number, arrival in enumerate(arrivals):
        while simulation.core.has_work and simulation.clock.now() < arrival:
            good += step()
        idle = max(0.0, arrival - simulation.clock.now())
        simulation.clock.advance(idle)
        request = make_request(f"r{number}", 150, arrival=arrival, deadline=arrival + DEADLINE)
        with suppress(QueueFullError):
            simulation.core.add_request(request)
    while simulation.core.has_work:
        good += step()
    simulation.core.check_integrity()
    return good


def test_five_times_the_load_leaves_the_goodput_where_it_was() -> None:
    rates = (100.0, 200.0, 300.0, 400.0, 500.0)
    goodput = {rate: answered_in_time(rate) for rate in rates}
    peak = max(goodput, key=lambda rate: goodput[rate])
    assert answered_in_time(5 * peak) >= 0.9 * goodput[peak]


def test_an_answer_that_comes_too_late_is_none(tmp_path: Path) -> None:
    config = toy_engine_config(write_toy_model(tmp_path / "toy", toy_config()))
    hold = Hold(config.model_dir)
    body = parse_request(
        {"history": {"item_ids": [1, 2], "timestamps": [1, 2]}, "deadline_ms": 300.0}
    )

    async def scenario() -> None:
        supervisor = EngineSupervisor(config, held_client)
        await supervisor.start()
        hold.hold()
        asked = asyncio.create_task(AsyncRecommender(EngineFleet([supervisor])).recommend(body))
        while not (hold.has_begun or asked.done()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        hold.release()
        with pytest.raises(DeadlineExceededError):
            await asked
        assert await supervisor.close()

    asyncio.run(asyncio.wait_for(scenario(), 120.0))

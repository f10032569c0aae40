"""One request's way through a fleet of fake engines, and what becomes of it when they fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helm_engine.exceptions import (
    EngineUnavailableError,
    HelmError,
    InvalidRequestError,
    QueueFullError,
    StepFailedError,
)
from helm_engine.protocol import Recommendation
from helm_engine.served_model import ServedModel
from tests.helm_engine.fake_fleet import Front, hold, run, settle, toy_served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A toy model."""
    return toy_served(tmp_path_factory.mktemp("models"))


def test_requests_are_spread_by_load(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = [asyncio.create_task(front.ask(f"u{n}")) for n in range(12)]
        await settle()
        assert [len(member.client.waiting) for member in front.members] == [4, 4, 4]
        for member in front.members:
            for request_id in list(member.client.waiting):
                member.client.answer(request_id)
        assert len(await asyncio.gather(*asked)) == 12

    run(lambda: Front(served, 3, policy="least_load"), scenario)


def test_round_robin_goes_round(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        for number in range(9):
            await front.ask(f"u{number}")
        assert [len(member.client.received) for member in front.members] == [3, 3, 3]

    run(lambda: Front(served, 3, policy="round_robin"), scenario)


def test_when_an_engine_dies_its_requests_go_to_another(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask())
        await settle()
        dead = front.holder()
        front.other(dead).client.answers = True
        dead.client.die()
        assert len((await asked).data) == 3
        assert front.fleet.requests.num_retries == 1
        # And as long as it is gone it gets nothing.
        for number in range(5):
            await front.ask(f"u{number}")
        assert len(dead.client.received) == 1

    run(lambda: Front(served), scenario)


@pytest.mark.parametrize("error", [StepFailedError("broken"), QueueFullError("full")])
def test_what_one_engine_cannot_do_another_may(served: ServedModel, error: HelmError) -> None:
    async def scenario(front: Front) -> None:
        front.members[0].client.error = error
        for number in range(6):
            await front.ask(f"u{number}")
        assert front.fleet.requests.num_retries > 0

    run(lambda: Front(served), scenario)


def test_what_all_engines_say_is_told_to_the_client(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        for member in front.members:
            member.client.error = QueueFullError("full")
        with pytest.raises(QueueFullError):
            await front.ask()
        assert [len(member.client.received) for member in front.members] == [1, 1]

    run(lambda: Front(served), scenario)


def test_no_more_than_three_engines_are_asked(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        for member in front.members:
            member.client.error = StepFailedError("no rows")
        with pytest.raises(StepFailedError):
            await front.ask()
        assert sum(len(member.client.received) for member in front.members) == 3

    run(lambda: Front(served, 5), scenario)


def test_an_error_of_the_request_is_its_own(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        for member in front.members:
            member.client.error = InvalidRequestError("no")
        with pytest.raises(InvalidRequestError):
            await front.ask()
        assert sum(len(member.client.received) for member in front.members) == 1

    run(lambda: Front(served), scenario)


def test_what_is_late_is_not_tried_again(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask(deadline_ms=100.0))
        await settle()
        front.clock.seconds += 0.2
        front.holder().client.die()
        with pytest.raises(EngineUnavailableError):
            await asked

    run(lambda: Front(served), scenario)


def test_an_engine_without_life_loses_its_requests_to_another(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask())
        await settle()
        silent = front.holder()
        front.other(silent).client.answers = True
        silent.client.silent_for = 5.0
        assert len((await asked).data) == 3
        assert silent.client.withdrawn == silent.client.received
        for number in range(5):
            await front.ask(f"u{number}")
        assert len(silent.client.received) == 1
        # It was only slow: it is used again.
        silent.client.silent_for, silent.client.answers = 0.0, True
        await asyncio.sleep(0.2)
        for number in range(8):
            await front.ask(f"v{number}")
        assert len(silent.client.received) > 1

    run(lambda: Front(served, suspect_timeout=0.2, policy="round_robin"), scenario)


def test_without_another_engine_a_silent_one_is_waited_for(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        for member in front.members:
            member.client.silent_for = 5.0
        asked = asyncio.create_task(front.ask())
        await asyncio.sleep(0.3)
        holder = front.holder()
        assert holder.client.withdrawn == []
        holder.client.answer(holder.client.received[0])
        assert len((await asked).data) == 3

    run(lambda: Front(served, suspect_timeout=0.1), scenario)


def test_a_hedge_answers_where_the_first_engine_takes_long(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask())
        await settle()
        slow = front.holder()
        front.other(slow).client.answers = True
        assert len((await asked).data) == 3
        await settle()
        assert slow.client.withdrawn == slow.client.received
        requests = front.fleet.requests
        assert (requests.num_hedges, requests.num_hedges_won, requests.num_retries) == (1, 1, 0)

    run(lambda: Front(served, hedge_ms=5.0), scenario)


def test_a_hedge_that_fails_leaves_the_first_engines_answer(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask())
        await settle()
        slow = front.holder()
        front.other(slow).client.error = QueueFullError("full")
        await asyncio.sleep(0.05)
        slow.client.answer(slow.client.received[0])
        assert len((await asked).data) == 3
        assert front.fleet.requests.num_hedges_won == 0

    run(lambda: Front(served, hedge_ms=5.0), scenario)


def test_who_hangs_up_is_withdrawn_everywhere(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask())
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await settle()
        for member in front.members:
            assert member.client.withdrawn == member.client.received != []

    run(lambda: Front(served, hedge_ms=5.0), scenario)


_EVENTS = st.sampled_from(["ask", "die", "come", "silent", "speak", "break", "mend", "answer"])


@settings(max_examples=60, deadline=None)
@given(events=st.lists(st.tuples(_EVENTS, st.integers(0, 2)), max_size=40), hedges=st.booleans())
def test_whatever_happens_each_client_gets_one_answer(
    served: ServedModel, events: Sequence[tuple[str, int]], hedges: bool
) -> None:
    async def scenario(front: Front) -> None:
        asked: list[asyncio.Task[Recommendation]] = []
        for event, place in events:
            member = front.members[place]
            if event == "ask":
                asked.append(asyncio.create_task(front.ask(f"u{place}")))
            elif event == "die" and member.client.is_alive:
                member.client.die()
            elif event == "come" and not member.client.is_alive:
                member.come().answers = False
            elif event in ("silent", "speak"):
                member.client.silent_for = 5.0 if event == "silent" else 0.0
            elif event in ("break", "mend"):
                member.client.error = StepFailedError("broken") if event == "break" else None
            elif event == "answer":
                for request_id in list(member.client.waiting):
                    member.client.answer(request_id)
            await asyncio.sleep(0.001 if hedges else 0.0)
        outcomes: Counter[str] = Counter()
        while not all(one.done() for one in asked):
            for member in front.members:
                for request_id in list(member.client.waiting):
                    member.client.answer(request_id)
            await asyncio.sleep(0)
        for one in asked:
            error = one.exception()
            assert error is None or isinstance(error, EngineUnavailableError | StepFailedError)
            outcomes["answered" if error is None else "error"] += 1
        assert sum(outcomes.values()) == len(asked)
        await settle()
        # Nothing is left with any engine, and nothing is charged to one.
        assert not any(member.client.waiting for member in front.members)
        registry = front.fleet._choice._dispatcher.registry
        for post in front.fleet.posts:
            if post.is_ready:
                assert registry.num_outstanding(post.name) == 0

    def make() -> Front:
        front = Front(served, 3, suspect_timeout=0.01, hedge_ms=0.5 if hedges else None)
        for member in front.members:
            member.client.answers = False
        return front

    run(make, scenario)

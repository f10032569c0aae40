"""A fleet of fake engines: who gets a request, and what becomes of it when engines fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_manager.pool_layout import PoolConfig
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.clock import Clock, SystemClock
from helm_engine.config import EngineConfig, FleetConfig
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import (
    EngineNotFoundError,
    EngineUnavailableError,
    HelmError,
    InvalidRequestError,
    QueueFullError,
    ReloadError,
    StepFailedError,
)
from helm_engine.protocol import Recommendation, parse_request
from helm_engine.served_model import ServedModel
from tests.helm_engine.fake_engines import FakeMember, of_version
from tests.toy_models import toy_config, toy_engine_config, write_toy_model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A toy model."""
    directory = write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())
    engine = load_engine(toy_engine_config(directory), SystemClock())
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


def test_an_unknown_policy_is_refused(served: ServedModel) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="policy: must be one of"):
            Front(served, policy="best")

    asyncio.run(scenario())


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


def test_without_any_engine_the_client_is_told_why(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        for member in front.members:
            member.client.die()
        with pytest.raises(EngineUnavailableError, match="none of 2 engines is ready"):
            await front.ask()
        front.members[1].come()
        await front.ask()

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
        holder.client.answer(holder.client.received[0])
        await asked

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


def test_a_drained_engine_finishes_what_it_has_and_gets_nothing(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = asyncio.create_task(front.ask())
        await settle()
        drained = front.holder()
        front.fleet.set_drained(drained.name, True)
        front.other(drained).client.answers = True
        for number in range(5):
            await front.ask(f"u{number}")
        assert len(drained.client.received) == 1
        drained.client.answer(drained.client.received[0])
        await asked
        # All drained: requests are answered all the same.
        front.fleet.set_drained(front.other(drained).name, True)
        drained.client.answers = True
        await front.ask()
        before = len(drained.client.received)
        front.fleet.set_drained(drained.name, False)
        await front.ask()
        assert len(drained.client.received) == before + 1
        with pytest.raises(EngineNotFoundError):
            front.fleet.set_drained("7", True)

    run(lambda: Front(served), scenario)


def test_an_engine_whose_host_leaves_gets_nothing(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        front.members[0].is_leaving = True
        for number in range(5):
            await front.ask(f"u{number}")
        assert not front.members[0].client.received

    run(lambda: Front(served), scenario)


def test_an_engine_that_came_back_gets_its_share_little_by_little(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        front.members[0].client.die()
        await front.ask()
        client = front.members[0].come()
        got = []
        for seconds in (0.0, 5.0, 20.0):
            front.clock.seconds = 100.0 + seconds
            before = len(client.received)
            for number in range(200):
                await front.ask(f"u{seconds}-{number}")
            got.append(len(client.received) - before)
        assert got[0] < 50 < got[1] < got[2] == 100, got

    run(lambda: Front(served, policy="round_robin"), scenario)


def test_engines_of_another_model_are_refused_at_the_start(served: ServedModel) -> None:
    async def scenario() -> None:
        front = Front(served)
        front.members[1].served = of_version(served, "other")
        with pytest.raises(ValueError, match=r"engine 1: it serves toy of version other"):
            await front.fleet.start()
        assert await front.fleet.close()

    asyncio.run(scenario())


def test_engines_of_other_blocks_are_refused(served: ServedModel) -> None:
    async def scenario() -> None:
        front = Front(served)
        layout = replace(served.layout, block_tokens=64)
        front.members[1].served = replace(served, layout=layout)
        with pytest.raises(ValueError, match="block_tokens: it has 64, the others 4"):
            await front.fleet.start()
        assert await front.fleet.close()

    asyncio.run(scenario())


def test_an_engine_that_comes_back_with_another_model_is_not_used(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        front.members[1].client.die()
        await front.ask()
        client = front.members[1].come(of_version(served, "other"))
        for number in range(5):
            await front.ask(f"u{number}")
        assert client.received == []
        (first, second) = front.fleet.describe()
        assert (first["state"], second["state"]) == ("ready", "refused")
        # Unless it is the only one.
        front.members[0].client.die()
        await front.ask()
        assert len(client.received) == 1

    run(lambda: Front(served), scenario)


def test_a_reload_goes_from_engine_to_engine_and_fails_no_request(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        new = of_version(served, "new")
        for member in front.members:
            member.reload_to = lambda: new
        versions: list[set[str]] = []

        async def keep_asking() -> None:
            while True:
                await front.ask(f"u{len(versions) % 7}")
                versions.append({member.served.version for member in front.members})

        asking = asyncio.create_task(keep_asking())
        await settle()
        assert (await front.fleet.reload(None)).version == "new"
        await settle()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled()
        assert {served.version, "new"} in versions and versions[-1] == {"new"}
        assert [member.num_reloads for member in front.members] == [1, 1, 1]
        assert front.fleet.served.version == "new"

    run(lambda: Front(served, 3), scenario)


def test_a_reload_that_fails_half_way_says_so(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        new = of_version(served, "new")
        front.members[0].reload_to = lambda: new

        def fails() -> ServedModel:
            raise ReloadError("no memory")

        front.members[1].reload_to = fails
        with pytest.raises(ReloadError, match=r"1 of 2 engines serve the new model.*no memory"):
            await front.fleet.reload(None)
        # Both versions are served, each user by one of them.
        for number in range(20):
            await front.ask(f"u{number}")
        got = [len(member.client.received) for member in front.members]
        assert sum(got) == 20 and min(got) > 3
        front.members[0].reload_to = fails
        with pytest.raises(ReloadError, match=r"^no memory"):
            await front.fleet.reload(None)

    run(lambda: Front(served), scenario)


def test_users_move_to_the_new_model_once(served: ServedModel) -> None:
    """While engines are replaced a user's model never goes back to the old one."""

    async def scenario(front: Front) -> None:
        front.fleet._rolls = True  # As within `reload`.
        bodies = [
            parse_request({"user": f"u{n}", "history": {"item_ids": [1], "timestamps": [1]}})
            for n in range(60)
        ]
        moved: set[str | None] = set()
        sizes = []
        for member in front.members:
            member.come(of_version(served, "new"))
            now = {
                body.user for body in bodies if front.fleet.model_for(body).served.version == "new"
            }
            assert moved <= now
            moved = now
            sizes.append(len(moved))
        assert 5 < sizes[0] < sizes[1] < sizes[2] < sizes[3] == len(bodies)

    run(lambda: Front(served, 4), scenario)


def test_a_request_that_names_its_model_goes_there(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        front.fleet._rolls = True  # As within `reload`.
        config: EngineConfig = replace(served.config, served_model_name="renamed")
        front.members[1].come(replace(of_version(served, "new"), config=config))
        for name, place in (("toy", 0), ("renamed", 1)):
            for number in range(4):
                assert (await front.ask(f"u{number}", model=name)).model == name
            assert len(front.members[place].client.received) == 4

    run(lambda: Front(served), scenario)


def test_closing_answers_all_that_wait(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        hold(front)
        asked = [asyncio.create_task(front.ask(f"u{n}")) for n in range(4)]
        await settle()
        front.fleet.fail_pending("the server is shutting down")
        for one in asked:
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                await one
        assert sum(len(member.client.received) for member in front.members) == 4

    run(lambda: Front(served), scenario)


def test_the_capacity_follows_the_engines(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        config = served.config.scheduler
        one = config.max_num_seqs + config.max_num_waiting
        changes = []
        front.fleet.on_change = lambda: changes.append(front.fleet.capacity)
        assert front.fleet.capacity == 3 * one
        front.members[2].client.die()
        await front.ask()
        front.members[2].come()
        await front.ask()
        assert changes == [2 * one, 3 * one]

    run(lambda: Front(served, 3), scenario)


def test_each_engines_metrics_carry_its_name(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        await front.ask()
        front.members[1].client.die()
        text = front.recommender.metrics.render().decode()
        assert 'helm:engine_up{engine="0",model_name="toy"} 1.0' in text
        assert 'helm:engine_up{engine="1",model_name="toy"} 0.0' in text
        assert 'helm:num_requests_running{engine="0",model_name="toy"} 0.0' in text
        assert 'helm:num_requests_running{engine="1",model_name="toy"}' not in text
        assert text.count("# HELP helm:engine_up ") == 1

    run(lambda: Front(served), scenario)


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


def test_engines_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from helm_engine.fleet_members import one_of_several

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    config = EngineConfig("model", pool=PoolConfig())  # type: ignore[arg-type]
    assert one_of_several(config, 1, 2).executor.num_threads == 4
    assert one_of_several(config, 1, 16).executor.num_threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert one_of_several(config, 1, 2).executor.num_threads == 1
    gpu = replace(config, executor=replace(config.executor, device="cuda"))
    assert one_of_several(gpu, 3, 4).executor.device == "cuda:3"

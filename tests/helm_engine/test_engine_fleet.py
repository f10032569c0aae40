"""A fleet of fake engines: who is there, who is drained, which model is served."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from block_manager.pool_layout import PoolConfig
from helm_engine.config import EngineConfig
from helm_engine.exceptions import (
    EngineNotFoundError,
    EngineUnavailableError,
    ReloadError,
)
from helm_engine.protocol import parse_request
from helm_engine.served_model import ServedModel
from model_executor.devices import select_device
from tests.helm_engine.fake_engines import of_version
from tests.helm_engine.fake_fleet import Front, hold, run, settle, toy_served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A toy model."""
    return toy_served(tmp_path_factory.mktemp("models"))


def test_an_unknown_policy_is_refused(served: ServedModel) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="policy: must be one of"):
            Front(served, policy="best")

    asyncio.run(scenario())


def test_without_any_engine_the_client_is_told_why(served: ServedModel) -> None:
    async def scenario(front: Front) -> None:
        for member in front.members:
            member.client.die()
        with pytest.raises(EngineUnavailableError, match="none of 2 engines is ready"):
            await front.ask()
        front.members[1].come()
        await front.ask()

    run(lambda: Front(served), scenario)


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
    fourth = one_of_several(gpu, 3, 4).executor
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert select_device(fourth.device, fourth.place, fourth.num_engines).index == 3

"""An engine reached over TCP: real cores, real sockets, hosts that come and go, a cut cable."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, FleetConfig, HostTierConfig
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_host import EngineHost
from helm_engine.engine_loader import load_engine
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.exceptions import (
    DeadlineExceededError,
    EngineUnavailableError,
    ReloadError,
)
from helm_engine.protocol import Recommendation, parse_request
from helm_engine.recommender import Recommender
from helm_engine.remote_engine import RemoteEngine
from helm_engine.remote_messages import FromHost, FrontBeat, Refusal, ServedMessage
from model_executor.cost_profile import CostProfile
from tests.helm_engine.held_core import Hold, held_client
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

WAIT_SECONDS = 60.0
KEY = bytes(range(32))
BODY = {
    "user": "ada",
    "history": {"item_ids": list(range(1, 21)), "timestamps": list(range(20))},
    "candidates": {"item_ids": [5, 6, 7]},
}


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """A toy model."""
    return toy_engine_config(write_toy_model(tmp_path / "toy", toy_config()))


class Host:
    """What `helm-engine engine` runs, in this process; its core is a process of its own."""

    def __init__(self, config: EngineConfig, address: str = "tcp://127.0.0.1:0") -> None:
        self.supervisor = EngineSupervisor(config, lambda one: held_client(one, hang_seconds=30))
        self.host = EngineHost(address, self.supervisor)

    def kill(self, number: signal.Signals) -> None:
        pid = self.supervisor.engine.client.pid
        assert pid is not None
        os.kill(pid, number)

    async def close(self) -> bool:
        await self.host.close()
        return await self.supervisor.close()


class Front:
    """A front of engines of other hosts."""

    def __init__(self, *addresses: str, lost_seconds: float = 30.0) -> None:
        self.members = [RemoteEngine(one, KEY, lost_seconds, 5.0) for one in addresses]
        config = FleetConfig(
            num_engines=0, remote=addresses, user_key=KEY, suspect_timeout=0.5, policy="round_robin"
        )
        self.fleet = EngineFleet(self.members, config)
        self.recommender = AsyncRecommender(self.fleet)

    async def ask(self, **fields: object) -> Recommendation:
        return await self.recommender.recommend(parse_request({**BODY, **fields}))


class Cable:
    """A TCP relay that can be cut, so that nothing passes and no connection ends, and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._mended = asyncio.Event()
        self._mended.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass(source, target))
            self._tasks.add(task)

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._mended.wait()
                target.write(data)
                await target.drain()
        except ConnectionError:
            pass
        finally:
            target.close()

    def cut(self) -> None:
        self._mended.clear()

    def mend(self) -> None:
        self._mended.set()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # Sockets are closed in the loop's next turn.


@asynccontextmanager
async def hosts(*configs: EngineConfig) -> AsyncIterator[list[Host]]:
    made = [Host(config) for config in configs]
    await asyncio.gather(*(host.supervisor.start() for host in made))
    try:
        yield made
    finally:
        for config in configs:
            Hold(config.model_dir).release()
        for host in made:
            await host.close()


@asynccontextmanager
async def front_of(*addresses: str, lost_seconds: float = 30.0) -> AsyncIterator[Front]:
    front = Front(*addresses, lost_seconds=lost_seconds)
    try:
        await front.fleet.start()
        yield front
    finally:
        await front.fleet.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT_SECONDS))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_answers_are_those_of_an_engine_in_one_process(config: EngineConfig) -> None:
    wanted = [item.score for item in Recommender.from_config(config).recommend(BODY).data]

    async def scenario() -> None:
        async with hosts(config) as [host], front_of(host.host.address) as front:
            first, second = await front.ask(), await front.ask()
            assert [item.score for item in first.data] == pytest.approx(wanted, rel=1e-5)
            assert second.data == first.data
            assert (first.usage.cached_tokens, second.usage.cached_tokens > 0) == (0, True)
            assert 0.0 <= second.usage.timings_ms.queue < 1e4
            assert await front.fleet.forget_user("ada") > 0
            assert (await front.ask()).usage.cached_tokens == 0
            await front.fleet.set_target(0.4)
            client = host.supervisor.engine.client
            await until(lambda: client.stats.emb_fraction_target == 0.4)
            await until(lambda: front.fleet.reports[0].emb_fraction_target == 0.4)

    run(scenario)


def test_several_fronts_share_an_engine_and_its_users(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with (
            hosts(config) as [host],
            front_of(host.host.address) as one,
            front_of(host.host.address) as other,
        ):
            await one.ask()
            assert (await other.ask()).usage.cached_tokens > 0
            answers = await asyncio.gather(*(front.ask() for front in (one, other) * 10))
            for answer in answers:
                scores = [item.score for item in answer.data]
                assert scores == pytest.approx([item.score for item in answers[0].data], rel=1e-4)

    run(scenario)


def test_withdrawals_and_deadlines_reach_the_engine(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with hosts(config) as [host], front_of(host.host.address) as front:
            hold.hold()
            first = asyncio.create_task(front.ask())
            await until(lambda: hold.has_begun)
            gone = asyncio.create_task(front.ask(user="gone"))
            await until(lambda: host.host.num_in_flight == 2)
            gone.cancel()
            with pytest.raises(DeadlineExceededError):
                await front.ask(user="late", deadline_ms=100.0)
            await until(lambda: host.host.num_in_flight == 1)
            hold.release()
            await first
            await until(lambda: host.host.num_in_flight == 0)

    run(scenario)


def test_requests_of_a_front_that_is_gone_are_withdrawn(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helm_engine.engine_host.FRONT_SECONDS", 0.5)

    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with hosts(config) as [host], front_of(host.host.address) as front:
            hold.hold()
            asked = asyncio.create_task(front.ask())
            await until(lambda: host.host.num_in_flight == 1)
            beats = front.members[0]._beats
            assert beats is not None
            beats.cancel()
            await until(lambda: host.host.num_in_flight == 0)
            asked.cancel()

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_when_a_core_dies_or_stops_another_engine_answers(
    config: EngineConfig, tmp_path: Path, number: signal.Signals
) -> None:
    second = toy_engine_config(write_toy_model(tmp_path / "b" / "toy", toy_config()))

    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with (
            hosts(config, second) as [one, other],
            front_of(one.host.address, other.host.address) as front,
        ):
            hold.hold()
            asked = [asyncio.create_task(front.ask(user=f"u{n}")) for n in range(6)]
            await until(lambda: hold.has_begun)
            one.kill(number)
            assert len(await asyncio.gather(*asked)) == 6
            assert front.fleet.requests.num_retries == 3
            if number == signal.SIGSTOP:
                one.kill(signal.SIGCONT)
            hold.release()
            # And in time both are there again.
            await until(lambda: one.supervisor.is_ready)
            await until(lambda: all(one["state"] == "ready" for one in front.fleet.describe()))

    run(scenario)


def test_a_host_that_is_started_anew_is_joined_again(config: EngineConfig) -> None:
    async def scenario() -> None:
        hold = Hold(config.model_dir)
        first = Host(config)
        address = first.host.address
        await first.supervisor.start()
        async with front_of(address) as front:
            await front.ask()
            hold.hold()
            asked = asyncio.create_task(front.ask())
            await until(lambda: hold.has_begun)
            await first.host.close()
            hold.release()
            await first.supervisor.close()
            second = Host(config, address)
            await second.supervisor.start()
            try:
                with pytest.raises(EngineUnavailableError, match="started anew"):
                    await asked
                await until(lambda: front.fleet.is_ready)
                assert (await front.ask()).usage.cached_tokens == 0
                assert front.members[0].num_restarts == 1
            finally:
                await second.close()

    run(scenario)


def test_a_cut_cable_costs_no_answer_where_there_is_another_engine(
    config: EngineConfig, tmp_path: Path
) -> None:
    second = toy_engine_config(write_toy_model(tmp_path / "b" / "toy", toy_config()))

    async def scenario() -> None:
        async with hosts(config, second) as [one, other]:
            cable = Cable(int(one.host.address.rpartition(":")[2]))
            try:
                address = await cable.open()
                async with front_of(address, other.host.address, lost_seconds=2.0) as front:
                    answers = await asyncio.gather(*(front.ask(user=f"u{n}") for n in range(4)))
                    cable.cut()
                    answers += [await front.ask(user=f"v{number}") for number in range(4)]
                    await until(lambda: front.fleet.describe()[0]["state"] == "down")
                    before = front.fleet.posts[0].num_requests
                    answers += await asyncio.gather(*(front.ask(user=f"w{n}") for n in range(4)))
                    assert front.fleet.posts[0].num_requests == before
                    assert all(len(answer.data) == 3 for answer in answers)
                    cable.mend()
                    await until(lambda: front.fleet.describe()[0]["state"] == "ready")
                    before = front.fleet.posts[0].num_requests
                    while front.fleet.posts[0].num_requests == before:
                        await front.ask()
            finally:
                await cable.close()

    run(scenario)


def test_an_engine_that_is_not_there_joins_later(config: EngineConfig) -> None:
    async def scenario() -> None:
        probe = zmq.asyncio.Context()
        taken = probe.socket(zmq.ROUTER)
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        taken.close(linger=0)
        probe.term()
        address = f"tcp://127.0.0.1:{port}"
        front = Front(address)
        front.members[0]._join_seconds = 0.2
        with pytest.raises(EngineUnavailableError, match="no engine answers"):
            await front.fleet.start()
        host = Host(config, address)
        await host.supervisor.start()
        try:
            await until(lambda: front.fleet.is_ready)
            await front.ask()
        finally:
            await front.fleet.close()
            await host.close()

    run(scenario)


def test_a_reload_over_the_wire(config: EngineConfig, tmp_path: Path) -> None:
    other = write_toy_model(tmp_path / "other", toy_config(), seed=99)

    async def scenario() -> None:
        async with hosts(config) as [host], front_of(host.host.address) as front:
            with pytest.raises(ReloadError, match="was not replaced"):
                await front.fleet.reload(tmp_path / "missing")
            served = await front.fleet.reload(other)
            assert served.name == "other"
            assert (await front.ask()).model == "other"
            assert front.members[0].num_reloads == 1
            # By somebody else: this front follows.
            await host.supervisor.reload(config.model_dir)
            await until(lambda: front.fleet.served.name == "toy")
            assert (await front.ask()).model == "toy"

    run(scenario)


def test_nonsense_at_an_open_port_does_no_harm(config: EngineConfig) -> None:
    async def scenario() -> None:
        async with hosts(config) as [host], front_of(host.host.address) as front:
            context = zmq.asyncio.Context()
            stranger = context.socket(zmq.DEALER)
            stranger.connect(host.host.address)
            decoder: FrameDecoder[FromHost] = FrameDecoder(FromHost)
            for frames in ([b""], [b"\x00" * 9], [b"x", b"y"], [b"\xc1"], [b"\x80"]):
                await stranger.send_multipart(frames)
                answer = decoder.decode(await stranger.recv_multipart())
                assert isinstance(answer, Refusal)
            beat = FrontBeat(protocol=999, host=None, life=None)
            await stranger.send_multipart(FrameEncoder().encode(beat))
            answer = decoder.decode(await stranger.recv_multipart())
            assert isinstance(answer, Refusal) and "protocol" in answer.reason
            context.destroy(linger=0)
            await front.ask()

    run(scenario)


def test_what_is_served_is_told_without_paths_and_passwords(
    config: EngineConfig, tmp_path: Path
) -> None:
    engine = load_engine(config, SystemClock())
    engine.close()
    costs = CostProfile("cpu", "test", 1.0, 0.1, 0.01, 0.1, 0.0, 0.01)
    told = replace(
        engine.served,
        config=replace(
            config,
            host_tier=HostTierConfig("redis://me:secret@rows:6379/0"),
            controller=ControllerConfig(decision_log=tmp_path / "log"),
        ),
        cost_profile=costs,
    )
    frames = FrameEncoder().encode(ServedMessage.of(told))
    for hidden in (b"secret", str(tmp_path).encode()):
        assert not any(hidden in frame for frame in frames)
    heard = FrameDecoder[ServedMessage](ServedMessage).decode(frames).served("10.0.0.7")
    for name in ("model_config", "version", "capabilities", "layout", "memory", "cost_profile"):
        assert getattr(heard, name) == getattr(told, name), name
    assert heard.name == told.name
    assert heard.config.scheduler == config.scheduler
    assert heard.config.limits == config.limits


def test_an_answer_takes_no_other_time_than_it_took(config: EngineConfig) -> None:
    """Queue times are differences of one clock, whatever the other side's clock shows."""

    async def scenario() -> None:
        hold = Hold(config.model_dir)
        async with hosts(config) as [host], front_of(host.host.address) as front:
            await front.ask()
            hold.hold()
            first = asyncio.create_task(front.ask(user="first"))
            await until(lambda: hold.has_begun)
            began = time.monotonic()
            asked = asyncio.create_task(front.ask())
            await asyncio.sleep(0.3)
            hold.release()
            answer = await asked
            await first
            waited = (time.monotonic() - began) * 1e3
            assert 250.0 < answer.usage.timings_ms.queue < waited

    run(scenario)

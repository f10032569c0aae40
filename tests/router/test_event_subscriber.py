"""A subscriber over real sockets: of the real publisher, and of one that errs on purpose."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from block_manager.events import KVEventBatch, RowEventBatch
from helm_engine.event_stream import END_OF_ANSWER, Frames
from router.event_subscriber import EventSubscriber
from tests.router.deviceless_engine import NAME, DevicelessEngine
from tests.router.fleet import kv_batch, stored
from tests.router.holdings import Holdings

DEADLINE_SECONDS = 20.0
NEVER = 1e5
"""Between two checks, where a batch alone must give rise to a question."""


def wait_until(is_so: Callable[[], bool], meanwhile: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        meanwhile()
        time.sleep(0.002)


@contextmanager
def following(
    addresses: tuple[str, str | None], check_seconds: float = 0.1, answer_seconds: float = 0.5
) -> Iterator[tuple[EventSubscriber, Holdings]]:
    holdings = Holdings()
    subscriber = EventSubscriber(
        NAME, *addresses, holdings, check_seconds=check_seconds, answer_seconds=answer_seconds
    )
    try:
        yield subscriber, holdings
    finally:
        subscriber.close()


def is_true_of(engine: DevicelessEngine, holdings: Holdings) -> bool:
    blocks, positions = holdings.blocks(NAME), holdings.positions(NAME)
    return blocks == engine.books.blocks() and positions == engine.books.positions()


def work(engine: DevicelessEngine, seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        engine.books.act(rng)
        engine.report()
    engine.books.visit(0, 20)  # It holds something in any case.
    engine.books.use_rows(0, 8)
    engine.report()


@pytest.mark.parametrize("seed", range(3))
def test_two_subscribers_hear_everything_in_order(seed: int) -> None:
    with DevicelessEngine() as engine, following(engine.addresses, 0.1, 20) as (one, first):
        with following(engine.addresses, 0.1, 20) as (two, second):
            wait_until(lambda: one.is_synced and two.is_synced, engine.report)
            work(engine, seed, 300)
            wait_until(lambda: all(is_true_of(engine, each) for each in (first, second)))
        assert first.num_forgotten == second.num_forgotten == 1
        for kind in (KVEventBatch, RowEventBatch):
            heard = [batch for batch in first.batches if isinstance(batch, kind)]
            assert heard == [batch for batch in second.batches if isinstance(batch, kind)]
            assert all(before.ts < after.ts for before, after in pairwise(heard))


@pytest.mark.parametrize("buffer_batches", [1, 10_000])
def test_one_that_comes_late_ends_with_the_truth(buffer_batches: int) -> None:
    with DevicelessEngine(buffer_batches) as engine:
        work(engine, 1, 200)
        with following(engine.addresses) as (subscriber, holdings):
            # While it asks, more happens.
            work(engine, 2, 50)
            wait_until(lambda: is_true_of(engine, holdings), engine.report)
            wait_until(lambda: subscriber.is_synced, engine.report)


@pytest.mark.parametrize("steps", [0, 5, 100])
def test_a_restarted_engine_is_forgotten_and_its_new_truth_arrives(steps: int) -> None:
    with DevicelessEngine() as engine, following(engine.addresses) as (_, holdings):
        for life in range(3):
            work(engine, life, 20)
            wait_until(lambda: is_true_of(engine, holdings), engine.report)
            engine.restart()
            work(engine, 10 + life, steps)
            wait_until(lambda: is_true_of(engine, holdings), engine.report)
            assert holdings.num_forgotten > 1 + life


class FakeEngine:
    """Publishes and answers what a test says; questions are answered while the test waits."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="helm-")
        self.addresses = f"ipc://{self._folder.name}/events", f"ipc://{self._folder.name}/replay"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.published = self._context.socket(zmq.XPUB)
        self.published.bind(self.addresses[0])
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.bind(self.addresses[1])
        self.kept: dict[int, bytes] = {}
        self.snapshot: list[Frames] = []
        self.asked: list[bytes] = []

    def send(self, *some: bytes) -> None:
        self.published.send_multipart(some)

    def publish(self, *numbers: int) -> None:
        for number in numbers:
            self.send(*frames(number, self.kept.setdefault(number, payload_of(number))))

    def answer(self) -> None:
        while self._replay.poll(0):
            client, _, request, *_ = self._replay.recv_multipart()
            self.asked.append(request)
            first = int.from_bytes(request, "big")
            known = [frames(*each) for each in sorted(self.kept.items()) if each[0] >= first]
            for each in (*(self.snapshot if request == b"snapshot" else known), END_OF_ANSWER):
                self._replay.send_multipart((client, b"", *each))

    def wait(self, is_so: Callable[[], bool]) -> None:
        wait_until(is_so, self.answer)

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._folder.cleanup()


def frames(number: int, payload: bytes) -> Frames:
    return b"kv@one@toy", number.to_bytes(8, "big", signed=True), payload


def payload_of(number: int, ts: float | None = None, hashes: Sequence[int] = ()) -> bytes:
    """A batch that stores the block of its number, or others; later ones are of a later time."""
    batch = kv_batch(stored(*(hashes or [number])))
    batch.ts = 1.0 + number if ts is None else ts
    return msgspec.msgpack.encode(batch)


@contextmanager
def fake_and_follower(
    *published: int, has_replay: bool = True, **seconds: float
) -> Iterator[tuple[FakeEngine, EventSubscriber, Holdings]]:
    with ExitStack() as stack:
        fake = FakeEngine()
        stack.callback(fake.close)
        addresses = fake.addresses[0], fake.addresses[1] if has_replay else None
        follower = following(addresses, **{"check_seconds": NEVER, "answer_seconds": 20} | seconds)
        subscriber, holdings = stack.enter_context(follower)
        fake.wait(lambda: bool(fake.published.poll(0)))  # It has subscribed.
        fake.wait(lambda: subscriber.is_synced or not has_replay)
        fake.publish(*published)
        fake.wait(lambda: holdings.blocks(NAME) == Counter(published))
        yield fake, subscriber, holdings


def test_what_was_lost_is_replayed() -> None:
    with fake_and_follower(0, 1) as (fake, subscriber, holdings):
        fake.kept |= {number: payload_of(number) for number in (2, 3)}
        fake.publish(4, 5)
        fake.wait(lambda: holdings.blocks(NAME) == Counter(range(6)))
        assert [batch.ts for batch in holdings.batches] == [1.0 + number for number in range(6)]
        assert (holdings.num_forgotten, subscriber.stats.gaps) == (1, 1)
        assert fake.asked[-1] == (1).to_bytes(8, "big")  # The last known one is asked for too.


def test_the_loss_of_the_latest_batch_is_noticed() -> None:
    with fake_and_follower(0, 1, check_seconds=0.05) as (fake, _, holdings):
        fake.kept[2] = payload_of(2)
        fake.wait(lambda: holdings.blocks(NAME) == Counter([0, 1, 2]))
        assert holdings.num_forgotten == 1


@pytest.mark.parametrize("gives_snapshots", [True, False])
def test_what_cannot_be_replayed_is_asked_for_in_whole(gives_snapshots: bool) -> None:
    with fake_and_follower(0, 1) as (fake, subscriber, holdings):
        fake.kept.clear()
        if gives_snapshots:
            # In two batches of one number, as a large one comes.
            fake.snapshot = [frames(4, payload_of(4, hashes=some)) for some in ([0, 1, 2], [3, 4])]
        fake.publish(4, 5)
        now = Counter(range(6)) if gives_snapshots else Counter([4, 5])
        fake.wait(lambda: holdings.blocks(NAME) == now)
        assert (holdings.num_forgotten, subscriber.stats.resyncs) == (2, 1)


def test_without_replay_a_gap_forgets_what_was_known() -> None:
    with fake_and_follower(0, 1, has_replay=False) as (fake, _, holdings):
        fake.publish(4, 5)
        fake.wait(lambda: holdings.blocks(NAME) == Counter([4, 5]))
        assert holdings.num_forgotten == 2


def test_a_resync_asks_for_everything_anew() -> None:
    with fake_and_follower(0, 1) as (fake, subscriber, holdings):
        subscriber.resync()
        fake.wait(lambda: holdings.num_forgotten == 2 and holdings.blocks(NAME) == Counter([0, 1]))


def test_an_engine_that_does_not_answer_is_forgotten_until_it_does() -> None:
    with fake_and_follower(0, 1, check_seconds=0.2, answer_seconds=0.2) as (fake, one, holdings):
        wait_until(lambda: holdings.num_forgotten > 1 and not one.is_synced)
        fake.wait(lambda: one.is_synced and holdings.blocks(NAME) == Counter([0, 1]))


def test_repeated_and_late_batches_change_nothing() -> None:
    with fake_and_follower(0, 1, 2) as (fake, subscriber, holdings):
        fake.publish(2, 0, 1, 2)
        fake.kept[3] = payload_of(3)
        fake.publish(4, 3, 4, 3)  # The one that is overtaken comes by replay first.
        fake.publish(5)
        fake.wait(lambda: holdings.blocks(NAME) == Counter(range(6)))
        assert [batch.ts for batch in holdings.batches] == [1.0 + number for number in range(6)]
        assert (holdings.num_forgotten, subscriber.stats.batches) == (1, 6)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_numbers_that_begin_again_mean_another_engine(number: int) -> None:
    with fake_and_follower(0, 1, 2) as (fake, _, holdings):
        fake.kept = {each: payload_of(each, 50.0 + each, [100 + each]) for each in range(number)}
        fake.kept[number] = payload_of(number, 90.0, [107])
        fake.publish(number)
        fake.wait(lambda: holdings.blocks(NAME) == Counter([*range(100, 100 + number), 107]))
        assert holdings.num_forgotten == 2


def test_another_engine_that_published_as_much_is_noticed() -> None:
    with fake_and_follower(0, 1, 2, check_seconds=0.05) as (fake, _, holdings):
        fake.kept = {each: payload_of(each, 50.0 + each, [100 + each]) for each in range(4)}
        fake.wait(lambda: holdings.blocks(NAME) == Counter(range(100, 104)))
        assert holdings.num_forgotten == 2


LARGE = 2**64 - 1
FOREIGN: list[tuple[list[Any], Counter[Any]]] = [
    ([["BlockStored", [7, LARGE], None, [1, 2], 1, None]], Counter([0, 7, LARGE])),
    ([["BlockStored", [b"x" * 32], 7, [1], 1, None, "GPU", 1, 2]], Counter([0, b"x" * 32])),
    ([["BlockStored", [7], None, [1], 1, None], ["BlockRemoved", [0]]], Counter([7])),
    ([["AllBlocksCleared"]], Counter()),
    ([{"type": "BlockStored", "block_hashes": [7], "mood": [1], "lora_id": "a"}], Counter([0, 7])),
    ([{"type": "Moved", "to": 1}, ["Moved", 1], ["BlockRemoved", [0], "GPU"]], Counter()),
]


@pytest.mark.parametrize(("events", "held"), FOREIGN)
def test_events_of_other_versions_are_understood(events: list[Any], held: Counter[Any]) -> None:
    with fake_and_follower(0) as (fake, _, holdings):
        fake.send(*frames(1, msgspec.msgpack.encode([2.0, events, None, "more"])))
        fake.wait(lambda: holdings.blocks(NAME) == held)
        assert holdings.num_forgotten == 1


ODD_EVENTS: list[Any] = [5, {"type": "BlockStored"}, {"type": [1]}, [["BlockStored"], [7]], [{}]]
ODD = [
    *(b"\xc1", b"text", msgspec.msgpack.encode({}), b"\x92\xcb", b"\x91" * 100_000),
    b"\x92\x01\x91\x81\x80\x01",  # A map with a map as its key.
    *(msgspec.msgpack.encode([2.0, [event]]) for event in ODD_EVENTS),
]


@pytest.mark.parametrize("payload", ODD, ids=range(len(ODD)))
def test_an_unreadable_batch_ends_nothing(payload: bytes) -> None:
    with fake_and_follower(0) as (fake, subscriber, holdings):
        fake.send(b"kv@", payload)  # Without a number; it is passed over.
        fake.send(*frames(1, payload))
        fake.wait(lambda: subscriber.stats.resyncs == 1 and subscriber.is_synced)
        fake.kept[1] = payload  # The engine's answers may hold it too.
        fake.publish(2)
        fake.wait(lambda: subscriber.stats.resyncs == 2)
        fake.kept = {2: payload_of(2)}
        fake.publish(3)
        fake.wait(lambda: holdings.blocks(NAME) == Counter([2, 3]) and subscriber.is_synced)


@pytest.mark.parametrize("has_replay", [True, False])
def test_close_ends_the_thread(has_replay: bool) -> None:
    fake = FakeEngine()
    addresses = fake.addresses[0], fake.addresses[1] if has_replay else None
    with following(addresses, NEVER, NEVER) as (subscriber, holdings):
        fake.publish(0)  # It may wait for an answer that never comes.
    fake.close()
    assert not subscriber.is_synced
    assert not subscriber._thread.is_alive()
    assert holdings.num_forgotten == 1

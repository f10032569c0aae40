"""Retries over real connections: waits take no time, they move a clock that the client reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from helm_engine.client import AsyncClient, Client, ServerConnectionError, ServerTimeoutError
from helm_engine.clock import SystemClock
from helm_engine.exceptions import (
    DeadlineExceededError,
    EngineUnavailableError,
    HelmError,
    InvalidRequestError,
    QueueFullError,
)
from tests.client.asking import KINDS, Asking
from tests.client.stub_server import (
    Scripted,
    Stub,
    address_of,
    bound_socket,
    error_entry,
    hang_up_on,
    serving,
)

HISTORY = {"item_ids": [1, 2]}
FULL = error_entry(429, "overloaded_error")
STOPPED = error_entry(503, "service_unavailable_error")


@pytest.fixture(params=KINDS)
def ask(request: pytest.FixtureRequest) -> Asking:
    return Asking(request.param)


@pytest.fixture(scope="module")
def running() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


@pytest.fixture
def stub(running: Stub) -> Stub:
    running.play(Scripted())
    return running


def test_a_full_queue_is_asked_again_when_it_said(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(429, FULL, {"retry-after": "3"}), Scripted())
    assert ask(stub.address, "recommend", history=HISTORY).id == "rec-1"
    assert ask.sleeps == [3.0]
    assert len({received.content for received in stub.received}) == 1


def test_a_date_to_come_back_at_counts_from_the_date_of_the_answer(ask: Asking, stub: Stub) -> None:
    # The server's clock is years behind ours.
    headers = {
        "date": "Wed, 21 Oct 2015 07:28:00 GMT",
        "retry-after": "Wed, 21 Oct 2015 07:28:04 GMT",
    }
    stub.play(Scripted(503, STOPPED, headers), Scripted())
    ask(stub.address, "recommend", history=HISTORY)
    assert ask.sleeps == [4.0]


@pytest.mark.parametrize("asked", ["", "soon", "-5", "nan", "inf", "Wed, 21 Oct 2015 07:28:00"])
def test_without_a_readable_wait_it_doubles_and_is_jittered(
    ask: Asking, stub: Stub, asked: str
) -> None:
    stub.play(Scripted(429, FULL, {"retry-after": asked}))
    with pytest.raises(QueueFullError):
        ask(stub.address, "recommend", history=HISTORY, options={"max_retries": 8})
    # Half of 0.1, 0.2, ... and then of the bound, because the jitter is 0.5.
    assert ask.sleeps == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5])
    assert len(stub.received) == 9


@pytest.mark.parametrize("max_retries", [0, 1, 2])
def test_without_a_deadline_retries_are_counted(ask: Asking, stub: Stub, max_retries: int) -> None:
    stub.play(Scripted(503, STOPPED))
    with pytest.raises(EngineUnavailableError):
        ask(stub.address, "recommend", history=HISTORY, options={"max_retries": max_retries})
    assert len(stub.received) == max_retries + 1


def test_without_a_deadline_nobody_waits_an_hour(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(429, FULL, {"retry-after": "3600"}))
    with pytest.raises(QueueFullError):
        ask(stub.address, "recommend", history=HISTORY)
    assert ask.sleeps == []


def test_with_a_deadline_it_goes_on_until_then(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(503, STOPPED, {"retry-after": "1"}))
    with pytest.raises(EngineUnavailableError, match="no: 503"):
        ask(stub.address, "recommend", history=HISTORY, deadline_ms=4500)
    # Every attempt is told what is left; the fifth wait would end after the deadline.
    left = [received.body()["deadline_ms"] for received in stub.received]
    assert left == pytest.approx([4500, 3500, 2500, 1500, 500])
    assert ask.sleeps == [1.0] * 4


def test_many_are_repeated_until_the_first_of_their_deadlines(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(429, FULL, {"retry-after": "1"}))
    requests = [
        {"history": HISTORY, "deadline_ms": 9000},
        {"history": HISTORY},
        {"history": HISTORY, "deadline_ms": 2500},
    ]
    with pytest.raises(QueueFullError):
        ask(stub.address, "recommend_many", requests)
    left = [
        [one.get("deadline_ms") for one in received.body()["requests"]]
        for received in stub.received
    ]
    assert left == [[9000, None, 2500], [8000, None, 1500], [7000, None, 500]]


def test_max_retries_0_turns_them_off_with_a_deadline_too(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(429, FULL, {"retry-after": "1"}), Scripted())
    with pytest.raises(QueueFullError):
        ask(
            stub.address, "recommend", history=HISTORY, deadline_ms=1e6,
            options={"max_retries": 0},
        )  # fmt: skip


@pytest.mark.parametrize("status", [400, 404, 418, 500, 502, 504])
def test_other_errors_are_not_repeated(ask: Asking, stub: Stub, status: int) -> None:
    stub.play(Scripted(status, error_entry(status), {"retry-after": "0"}), Scripted())
    with pytest.raises(HelmError):
        ask(stub.address, "recommend", history=HISTORY, deadline_ms=1000)
    assert len(stub.received) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_not_up_yet_is_tried_again(kind: str) -> None:
    bound, stub = bound_socket(), Stub()
    with ExitStack() as stack:
        ask = Asking(kind, on_sleep=lambda: stack.enter_context(serving(stub, bound)))
        assert ask(address_of(bound), "recommend", history=HISTORY).id == "rec-1"
    assert len(ask.sleeps) == len(stub.received) == 1


def test_a_server_that_is_never_up_cannot_be_reached(ask: Asking) -> None:
    with bound_socket() as nobody:
        for deadline_ms in (None, 1000.0):
            with pytest.raises(ServerConnectionError, match="cannot reach the server") as raised:
                ask(address_of(nobody), "recommend", history=HISTORY, deadline_ms=deadline_ms)
            assert isinstance(raised.value, ConnectionError)
            assert isinstance(raised.value.__cause__, httpx.ConnectError)
    assert len(ask.sleeps) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_hang_up_before_any_answer_is_tried_again(kind: str) -> None:
    bound, stub = bound_socket(), Stub()
    hanging_up = hang_up_on(bound, times=1)
    with ExitStack() as stack:
        ask = Asking(kind, on_sleep=lambda: stack.enter_context(serving(stub, bound)))
        assert ask(address_of(bound), "recommend", history=HISTORY).id == "rec-1"
    hanging_up.join()
    assert len(ask.sleeps) == 1


def test_a_hang_up_within_the_answer_is_not_tried_again(ask: Asking, stub: Stub) -> None:
    stub.play(Scripted(is_cut_off=True), Scripted())
    with pytest.raises(ServerConnectionError, match="within the answer") as raised:
        ask(stub.address, "recommend", history=HISTORY, deadline_ms=60_000)
    assert not isinstance(raised.value, ServerTimeoutError)
    assert len(stub.received) == 1
    assert ask.sleeps == []


@pytest.mark.parametrize("answer", [Scripted(never_comes=True), Scripted(trickles=True)])
def test_an_answer_that_does_not_come_is_waited_for_until_the_deadline(
    ask: Asking, stub: Stub, answer: Scripted
) -> None:
    stub.play(answer)
    with pytest.raises(DeadlineExceededError):
        ask(
            stub.address, "recommend", history=HISTORY, deadline_ms=100,
            options={"clock": SystemClock()},
        )  # fmt: skip
    assert len(stub.received) == 1


@pytest.mark.parametrize("answer", [Scripted(never_comes=True), Scripted(trickles=True)])
def test_without_a_deadline_the_timeout_ends_an_attempt(
    ask: Asking, stub: Stub, answer: Scripted
) -> None:
    stub.play(answer)
    with pytest.raises(ServerTimeoutError) as raised:
        ask(stub.address, "recommend", history=HISTORY, options={"timeout": 0.1})
    assert isinstance(raised.value, TimeoutError)
    assert len(stub.received) == 1


def test_a_deadline_that_passes_before_the_first_attempt_is_said(ask: Asking, stub: Stub) -> None:
    class Jumping(SystemClock):
        def __init__(self) -> None:
            self.moments = iter([0.0, 5.0])

        def now(self) -> float:
            return next(self.moments)

    with pytest.raises(DeadlineExceededError, match="before the request was sent"):
        ask(
            stub.address, "recommend", history=HISTORY, deadline_ms=1000,
            options={"clock": Jumping()},
        )  # fmt: skip
    assert stub.received == []


def test_a_connection_is_used_again(stub: Stub) -> None:
    ports: list[int] = []

    def note(response: httpx.Response) -> None:
        ports.append(response.extensions["network_stream"].get_extra_info("client_addr")[1])

    stub.play(Scripted(400, error_entry(400, "invalid_request_error")), Scripted())
    http = httpx.Client(event_hooks={"response": [note]})
    with http, Client(stub.address, http_client=http) as client:
        with pytest.raises(InvalidRequestError):
            client.recommend(history=HISTORY)
        client.recommend(history=HISTORY)
    assert len(set(ports)) == 1


def test_a_client_of_the_caller_stays_open(stub: Stub) -> None:
    with httpx.Client() as http:
        with Client(stub.address, http_client=http) as client:
            client.recommend(history=HISTORY)
        assert not http.is_closed


def test_coroutines_share_a_client_and_can_be_cancelled(stub: Stub) -> None:
    async def run() -> None:
        async with AsyncClient(stub.address) as client:
            answers = await asyncio.gather(
                *(client.recommend(history=HISTORY, top_k=k) for k in range(1, 21))
            )
            assert len(answers) == 20
            stub.play(Scripted(never_comes=True), Scripted())
            waiting = asyncio.create_task(client.recommend(history=HISTORY))
            while not stub.received:
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await client.recommend(history=HISTORY)).id == "rec-1"

    asyncio.run(run())

"""Of random scripts of answers: nothing starts, and nobody sleeps, beyond the deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from helm_engine.client import ServerConnectionError, ServerTimeoutError
from helm_engine.client.messages import Answer, Failure, Outcome, Pause, Send
from helm_engine.client.options import ClientOptions
from helm_engine.client.session import Session
from helm_engine.clock import VirtualClock
from helm_engine.exceptions import HelmError
from tests.client.asking import KINDS, Asking
from tests.client.stub_server import RECOMMENDATION, error_entry

HISTORY = {"item_ids": [1]}
ROUNDING_SECONDS = 1e-9
KINDS_BY_STATUS = {
    429: "overloaded_error",
    500: "internal_error",
    503: "service_unavailable_error",
}


@dataclass(frozen=True, slots=True)
class Happening:
    """What one attempt meets."""

    takes: float
    """Seconds to the answer."""
    status: int
    """0: the connection breaks before anything was answered."""
    retry_after: str
    oversleeps: float
    """Seconds by which the wait that follows is too long."""

    def answer(self, num_requests: int | None) -> tuple[int, dict[str, str], bytes]:
        """To a list of so many requests; None = to one that is no list."""
        body: object = RECOMMENDATION if num_requests is None else {
            "object": "list", "data": [RECOMMENDATION] * num_requests,
        }  # fmt: skip
        if self.status != 200:
            body = error_entry(self.status, KINDS_BY_STATUS[self.status])
        headers = {"retry-after": self.retry_after} if self.retry_after else {}
        return self.status, headers, msgspec.json.encode(body)


seconds = st.floats(0, 3)
happenings = st.builds(
    Happening,
    takes=st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 0.1), seconds),
    status=st.sampled_from([429] * 4 + [503] * 4 + [0] * 3 + [200, 500]),
    retry_after=st.one_of(
        st.just(""), st.floats(0, 0.5).map(str), st.integers(0, 4).map(str), st.just("61")
    ),
    oversleeps=st.one_of(st.just(0.0), seconds),
)
scripts = st.lists(happenings, min_size=1, max_size=8)
deadlines = st.one_of(st.none(), st.floats(1, 500), st.floats(500, 5_000), st.floats(2_000, 5_000))
# Never 0: where answers take no time either, a call would stand still in virtual time.
jitters = st.floats(0.05, 1, exclude_max=True)


@dataclass(slots=True)
class Attempt:
    at: float
    limit: float
    body: Any


class World:
    """Carries out the steps of a call in virtual time, after a script that repeats its end."""

    def __init__(self, script: list[Happening], clock: VirtualClock) -> None:
        self.clock = clock
        self.attempts: list[Attempt] = []
        self.pauses: list[tuple[float, float]] = []
        """Moment and seconds."""
        self.ended: HelmError | None = None
        self._script = script

    def _current(self) -> Happening:
        return self._script[min(len(self.attempts) - 1, len(self._script) - 1)]

    def attempt(self, send: Send) -> Outcome:
        body = msgspec.json.decode(send.content or b"null")
        self.attempts.append(Attempt(self.clock.now(), send.seconds, body))
        happening = self._current()
        if happening.takes > send.seconds:
            self.clock.advance(send.seconds)
            return Failure(ServerTimeoutError("slow"), may_retry=False)
        self.clock.advance(happening.takes)
        if happening.status == 0:
            return Failure(ServerConnectionError("broken"), may_retry=True)
        return Answer(*happening.answer(len(body["requests"]) if "requests" in body else None))

    def pause(self, pause: Pause) -> Outcome:
        self.pauses.append((self.clock.now(), pause.seconds))
        self.clock.advance(pause.seconds + self._current().oversleeps)
        return None

    def run(self, options: ClientOptions, requests: list[dict[str, Any]], is_list: bool) -> None:
        session = Session(options)
        steps: Any = (
            session.recommend_many(requests) if is_list else session.recommend(requests[0], None)
        )
        outcome: Outcome = None
        try:
            while True:
                action = steps.send(outcome)
                outcome = self.pause(action) if isinstance(action, Pause) else self.attempt(action)
        except StopIteration:
            pass
        except HelmError as error:
            self.ended = error


@given(
    script=scripts, deadlines_ms=st.lists(deadlines, min_size=1, max_size=3),
    is_list=st.booleans(), timeout=st.floats(0.1, 5), max_retries=st.sampled_from([0, 1, 2, 4]),
    jitter=jitters,
)  # fmt: skip
def test_nothing_happens_beyond_the_deadline(
    script: list[Happening], deadlines_ms: list[float | None], is_list: bool,
    timeout: float, max_retries: int, jitter: float,
) -> None:  # fmt: skip
    deadlines_ms = deadlines_ms if is_list else deadlines_ms[:1]
    requests = [{"history": HISTORY, "deadline_ms": one} for one in deadlines_ms]
    ends = [math.inf if one is None else one / 1000 for one in deadlines_ms]
    world = World(script, VirtualClock())
    options = ClientOptions(
        timeout=timeout, max_retries=max_retries, clock=world.clock, jitter=lambda: jitter
    )
    world.run(options, requests, is_list)

    assert world.attempts
    for attempt in world.attempts:
        assert attempt.at < min(ends)
        assert 0 < attempt.limit <= timeout
        assert attempt.at + attempt.limit <= max(ends) + ROUNDING_SECONDS
        bodies = attempt.body["requests"] if is_list else [attempt.body]
        for body, end in zip(bodies, ends, strict=True):
            if math.isinf(end):
                assert "deadline_ms" not in body
            else:
                assert body["deadline_ms"] > 0
                assert math.isclose(body["deadline_ms"] / 1000, end - attempt.at, abs_tol=1e-9)
    for at, waited in world.pauses:
        assert at + waited < min(ends)
    if max_retries == 0 or math.isinf(min(ends)):
        assert len(world.attempts) <= max_retries + 1
    assert len(world.pauses) - len(world.attempts) in (-1, 0)
    event(f"{len(world.attempts)} attempts, ended by {type(world.ended).__name__}")


@given(script=scripts, deadline_ms=deadlines, jitter=jitters)
def test_it_gives_up_only_where_it_must(
    script: list[Happening], deadline_ms: float | None, jitter: float
) -> None:
    world = World(script, VirtualClock())
    options = ClientOptions(timeout=60.0, clock=world.clock, jitter=lambda: jitter)
    world.run(options, [{"history": HISTORY, "deadline_ms": deadline_ms}], is_list=False)
    end = math.inf if deadline_ms is None else deadline_ms / 1000
    last = world._current()
    if world.ended is None:
        assert last.status == 200
    elif last.status != 500 and last.takes <= world.attempts[-1].limit:
        # It could have been repeated, so there was no time or no attempt left.
        asked = float(last.retry_after or 0) if last.status else 0.0
        wait = max(asked, jitter * min(5.0, 0.1 * 2 ** (len(world.attempts) - 1)))
        assert (
            world.clock.now() + wait >= end
            or (deadline_ms is None and len(world.attempts) == options.max_retries + 1)
            or (deadline_ms is None and last.retry_after == "61")
        )
    for (_, waited), happening in zip(world.pauses, script, strict=False):
        if happening.status and happening.retry_after:
            assert waited >= float(happening.retry_after)


@settings(max_examples=25)  # Each makes two clients.
@given(script=scripts, deadline_ms=deadlines, jitter=jitters)
def test_the_sync_and_the_async_client_do_the_same(
    script: list[Happening], deadline_ms: float | None, jitter: float
) -> None:
    traces = []
    for kind in KINDS:
        sent: list[tuple[float, Any]] = []
        left = list(script)

        def handle(request: httpx.Request) -> httpx.Response:
            happening = left.pop(0) if len(left) > 1 else left[0]  # noqa: B023
            sent.append((ask.clock.now(), msgspec.json.decode(request.content)))  # noqa: B023
            ask.clock.advance(happening.takes)  # noqa: B023
            if happening.status == 0:
                raise httpx.ConnectError("refused")
            status, headers, content = happening.answer(None)
            return httpx.Response(status, headers=headers, content=content)

        ask = Asking(kind, handler=handle, jitter=lambda: jitter)
        result: object
        try:
            answer = ask("http://stub", "recommend", history=HISTORY, deadline_ms=deadline_ms)
            result = answer.id
        except HelmError as error:
            result = type(error), str(error)
        traces.append((sent, ask.sleeps, result))
    assert traces[0] == traces[1]

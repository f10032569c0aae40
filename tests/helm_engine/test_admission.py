"""The door of the front: beyond the limit nothing of a request is read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from helm_engine.admission import Admission
from helm_engine.config import SchedulerConfig
from helm_engine.entrypoints.early_refusal import RefuseEarly
from helm_engine.exceptions import HelmError, QueueFullError


class App:
    """Reads the body and answers when it is let; may fail instead."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})


class Exchange:
    """One request of a client, and what it was answered."""

    def __init__(self, door: RefuseEarly, path: str = "/v1/recommend") -> None:
        self.was_read = False
        self.sent: list[Message] = []
        self.task = asyncio.ensure_future(
            door({"type": "http", "path": path}, self._receive, self._send)
        )

    async def _receive(self) -> Message:
        self.was_read = True
        return {"type": "http.request", "body": b"{}"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def status(self) -> int:
        await self.task
        return int(self.sent[0]["status"])


def door_of(app: App, limit: int) -> tuple[RefuseEarly, Admission, list[HelmError]]:
    admission, refused = Admission(limit), []  # type: tuple[Admission, list[HelmError]]
    return RefuseEarly(app, admission, ("/v1/recommend",), refused.append), admission, refused


def test_as_many_are_held_as_may_run_and_wait() -> None:
    admission = Admission.to(SchedulerConfig(max_num_seqs=2, max_num_waiting=3))
    assert admission.limit == 5


def test_what_is_beyond_the_limit_is_refused_unread_and_told_when_to_come_again() -> None:
    async def scenario() -> None:
        app = App()
        door, admission, refused = door_of(app, 2)
        held = [Exchange(door) for _ in range(2)]
        await asyncio.sleep(0)
        late = Exchange(door)
        assert await late.status() == 429
        assert not late.was_read
        headers = {name.lower(): value for name, value in late.sent[0]["headers"]}
        assert int(headers[b"retry-after"]) >= 1
        error: dict[str, Any] = json.loads(late.sent[1]["body"])["error"]
        assert (error["code"], error["type"]) == (429, "overloaded_error")
        assert "the limit is 2" in error["message"]
        assert [type(error) for error in refused] == [QueueFullError]
        app.go.set()
        assert [await one.status() for one in held] == [200, 200]
        assert admission.num_held == 0
        assert await Exchange(door).status() == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [RuntimeError("broken"), asyncio.CancelledError()])
def test_a_request_that_fails_leaves_its_place(error: Exception) -> None:
    async def scenario() -> None:
        app = App()
        door, admission, refused = door_of(app, 1)
        app.error = error
        app.go.set()
        with pytest.raises(type(error)):
            await Exchange(door).task
        assert admission.num_held == 0
        assert refused == []

    asyncio.run(scenario())


def test_other_paths_pass_a_full_door() -> None:
    async def scenario() -> None:
        app = App()
        door, admission, _ = door_of(app, 1)
        with admission.held():
            app.go.set()
            assert await Exchange(door, "/health").status() == 200
            assert await Exchange(door).status() == 429

    asyncio.run(scenario())

"""What every answer carries, and bodies that are refused before they are read."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import Message

from helm_engine.entrypoints.body_limit import BodyLimit
from helm_engine.entrypoints.errors import install_error_handlers
from helm_engine.entrypoints.request_ids import RequestIds, TraceIds

MAX_BYTES = 100
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def application() -> FastAPI:
    """Counts bytes, and fails for want of them."""
    app = FastAPI()
    app.add_middleware(BodyLimit, max_bytes=MAX_BYTES)
    app.add_middleware(RequestIds)
    install_error_handlers(app)

    @app.post("/count")
    async def count(request: Request) -> float:
        body = await request.body()
        return 1 / len(body)

    return app


def ask(content: bytes, **headers: str) -> httpx.Response:
    async def asking() -> httpx.Response:
        # As over HTTP: an exception has been answered by then.
        transport = httpx.ASGITransport(application(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/count", content=content, headers=headers)

    return asyncio.run(asking())


def test_an_unexpected_failure_says_nothing_but_the_ids() -> None:
    answer = ask(b"", **{"X-Request-Id": "seven", "traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "seven"
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert answer.json()["error"] == {
        "message": "internal error", "type": "internal_error", "param": None, "code": 500,
    }  # fmt: skip


def test_a_body_up_to_the_limit_is_read() -> None:
    assert ask(b"x" * MAX_BYTES).json() == 1 / MAX_BYTES
    refused = ask(b"x" * (MAX_BYTES + 1))
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "body")
    assert re.fullmatch("[0-9a-f]{32}", refused.headers["x-request-id"])


@pytest.mark.parametrize(("announced", "read"), [(b"101", 0), (None, 2)])
def test_a_body_is_read_no_further_than_needed(announced: bytes | None, read: int) -> None:
    chunks = 0
    answered: list[Message] = []

    async def receive() -> Message:
        nonlocal chunks
        chunks += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    async def send(message: Message) -> None:
        answered.append(message)

    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": "/count", "raw_path": b"/count",
        "query_string": b"", "root_path": "",
        "headers": [] if announced is None else [(b"content-length", announced)],
    }  # fmt: skip
    asyncio.run(application()(scope, receive, send))
    assert (answered[0]["status"], chunks) == (413, read)


@pytest.mark.parametrize(
    ("header", "is_known"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f" 00-{TRACE}-{SPAN}-00 ", True),
        (f"01-{TRACE}-{SPAN}-01-what-comes-later", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        ("", False),
        (None, False),
    ],
)
def test_traceparent_is_read_as_w3c_has_it(header: str | None, is_known: bool) -> None:
    found = TraceIds.parse(header)
    assert (found is not None) == is_known
    if found is not None:
        assert (found.trace_id, found.span_id) == (TRACE, SPAN)

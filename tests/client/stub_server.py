"""A real HTTP server whose answers are scripted, and one that hangs up without any."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn
from starlette.types import Message, Receive, Scope, Send

RECOMMENDATION: dict[str, Any] = {
    "id": "rec-1",
    "object": "recommendation",
    "created": 1,
    "model": "stub",
    "data": [{"index": 0, "item_id": 7, "score": 0.5, "task_scores": None}],
    "usage": {
        "history_tokens": 1,
        "cached_tokens": 0,
        "reuse_blocked": None,
        "candidates": 0,
        "rows_requested": 1,
        "rows_resident": 0,
        "timings_ms": {"queue": 0.0, "load": 0.0, "prefill": 0.0, "score": 0.0},
    },
}


def error_entry(status: int, kind: str = "some_error", param: str | None = None) -> dict[str, Any]:
    """An OpenAI error body."""
    return {"error": {"message": f"no: {status}", "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Scripted:
    """One answer."""

    status: int = 200
    body: object = field(default_factory=lambda: RECOMMENDATION)
    """Bytes are sent as they are, everything else as JSON or MessagePack."""
    headers: dict[str, str] = field(default_factory=dict)
    is_cut_off: bool = False
    """The connection ends within the body."""
    never_comes: bool = False
    """Until the server stops."""
    trickles: bool = False
    """The body never ends: a byte at a time."""


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came."""

    method: str
    raw_path: str
    headers: dict[str, str]
    content: bytes

    def body(self) -> Any:
        """The content, decoded."""
        if self.headers["content-type"] == "application/msgpack":
            return msgspec.msgpack.decode(self.content)
        return msgspec.json.decode(self.content)


class Stub:
    """Gives the scripted answers in their order, the last one again and again."""

    def __init__(self, *script: Scripted) -> None:
        self.script = list(script) or [Scripted()]
        self.received: list[Received] = []
        self.address = ""
        self.stopping = threading.Event()

    def play(self, *script: Scripted) -> None:
        """Begins anew with another script."""
        self.script = list(script)
        self.received.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.received.append(
            Received(scope["method"], scope["raw_path"].decode(), headers, content)
        )
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        await self._answer(answer, headers.get("accept", ""), send)

    async def _answer(self, answer: Scripted, accepted: str, send: Send) -> None:
        while answer.never_comes and not self.stopping.is_set():
            await _moment()
        media_type, body = "application/json", answer.body
        if not isinstance(body, bytes):
            if accepted == "application/msgpack":
                media_type, body = accepted, msgspec.msgpack.encode(body)
            else:
                body = msgspec.json.encode(body)
        headers = {"content-type": media_type, "content-length": str(len(body)), **answer.headers}
        if answer.trickles:
            headers["content-length"] = "1000000"
        start: Message = {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        await send(start)
        while answer.trickles and not self.stopping.is_set():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await _moment()
        # uvicorn closes the connection of an answer that is shorter than it said.
        sent = b"" if answer.trickles else body[: len(body) // 2] if answer.is_cut_off else body
        await send({"type": "http.response.body", "body": sent})


async def _moment() -> None:
    await asyncio.sleep(0.002)


def bound_socket() -> socket.socket:
    """A port of our own where connections are refused, because nobody listens yet."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.bind(("127.0.0.1", 0))
    return bound


def address_of(bound: socket.socket) -> str:
    """Its URL."""
    return f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def serving(stub: Stub, bound: socket.socket | None = None) -> Iterator[Stub]:
    """Serves in a thread until the end of the block."""
    bound = bound or bound_socket()
    stub.address = address_of(bound)
    # An answer cut off within its body is an error to uvicorn, which would print it.
    config = uvicorn.Config(
        stub, log_config=None, log_level="critical", lifespan="off", date_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stub did not start"
        threading.Event().wait(0.001)
    try:
        yield stub
    finally:
        stub.stopping.set()
        server.should_exit = True
        thread.join()
        bound.close()


def hang_up_on(bound: socket.socket, times: int) -> threading.Thread:
    """Accepts so many connections, and closes each unanswered."""
    bound.listen()

    def hang_up() -> None:
        for _ in range(times):
            connection, _ = bound.accept()
            connection.recv(65536)
            connection.close()

    thread = threading.Thread(target=hang_up, daemon=True)
    thread.start()
    return thread

"""Refuses request bodies beyond a limit while they arrive, before anything is parsed."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: a body of more than `max_bytes` ends with status 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the bytes that the application reads."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A body that says itself that it is too large is not waited for.
        is_announced = _announced_bytes(scope) > self._max_bytes
        received = 0

        async def counted() -> Message:
            nonlocal received
            message: Message = {} if is_announced else await receive()
            received += len(message.get("body", b""))
            if is_announced or received > self._max_bytes:
                raise HTTPException(413, f"has more than {self._max_bytes} bytes, the limit")
            return message

        await self._app(scope, counted, send)


def _announced_bytes(scope: Scope) -> int:
    """Of `Content-Length`; 0 where the body comes in chunks."""
    announced = dict(scope["headers"]).get(b"content-length", b"")
    return int(announced) if announced.isdigit() else 0

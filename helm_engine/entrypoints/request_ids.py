"""Request ids and trace ids: taken over from the client or made up, and sent back."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_REQUEST_ID = 128
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]+")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceIds(NamedTuple):
    """A place in a distributed trace, as W3C Trace Context has it."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    flags: str
    """Two; 01 = sampled."""

    @classmethod
    def parse(cls, header: str | None) -> TraceIds | None:
        """Of a `traceparent` header; None where it is missing or wrong."""
        found = _TRACEPARENT.fullmatch((header or "").strip())
        if found is None:
            return None
        version, trace_id, span_id, flags, more = found.groups()
        # Later versions may say more; the present one says exactly this much.
        if version == "ff" or (version == "00" and more):
            return None
        if not int(trace_id, 16) or not int(span_id, 16):
            return None
        return cls(trace_id, span_id, flags)

    def header(self) -> str:
        """As a `traceparent` or `traceresponse` header."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def request_id_of(header: str | None) -> str:
    """The client's request id where it sent a proper one, else a new one."""
    if header and len(header) <= MAX_REQUEST_ID and _REQUEST_ID.fullmatch(header):
        return header
    return uuid.uuid4().hex


def answer_headers(state: Mapping[str, Any]) -> dict[str, str]:
    """The ids that are sent back, out of the state of a request that `RequestIds` has seen."""
    return {"X-Request-Id": state["request_id"], "traceresponse": state["trace"].header()}


class RequestIds:
    """ASGI middleware: `X-Request-Id` and `traceparent` in, `X-Request-Id` and `traceresponse` out.

    The handler finds them as `request.state.request_id`, `request.state.parent` (the client's span,
    or None) and `request.state.trace` (what is answered, unless the handler opens a span).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gives the request its ids and the answer the same."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get("x-request-id"))
        parent = TraceIds.parse(headers.get("traceparent"))
        trace = TraceIds(
            parent.trace_id if parent else secrets.token_hex(16),
            secrets.token_hex(8),
            parent.flags if parent else "00",
        )
        scope.setdefault("state", {}).update(request_id=request_id, trace=trace, parent=parent)

        async def with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(answer_headers(scope["state"]))
            await send(message)

        await self._app(scope, receive, with_ids)

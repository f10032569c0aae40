"""Routes whose JSON bodies are parsed with their integer arrays as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from helm_engine.int_array import parse_json


class _ArrayRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


class ArrayRoute(APIRoute):
    """A route for bodies that hold thousands of integers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, over requests that parse their bodies quickly."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_ArrayRequest(request.scope, request.receive))

        return handle

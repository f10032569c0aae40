"""Refuses requests without the right API key before anything of them is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from helm_engine.entrypoints.api_keys import ApiKeys
from helm_engine.entrypoints.errors import error_response
from helm_engine.exceptions import HelmError


class RequireApiKey:
    """ASGI middleware: requests without the right key end with 401 or 403."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks the key before anything of the body is read."""
        if scope["type"] == "http":
            try:
                self._keys.check(scope["path"], dict(scope["headers"]).get(b"authorization"))
            except HelmError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

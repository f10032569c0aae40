"""Refuses requests beyond what the front may hold, before their bodies are read."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from helm_engine.admission import Admission
from helm_engine.entrypoints.errors import error_response
from helm_engine.exceptions import HelmError, QueueFullError


class RefuseEarly:
    """ASGI middleware: requests beyond the limit end with 429 and Retry-After."""

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        paths: Collection[str],
        count: Callable[[HelmError], None],
    ) -> None:
        """Takes what is to be guarded.

        Args:
            app: the application.
            admission: how many requests are held.
            paths: of the requests that are counted; others always pass.
            count: counts a refusal.
        """
        self._app = app
        self._admission = admission
        self._paths = paths
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Holds a request until it is answered."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        # The application answers errors of its own itself: this one can only be the door's.
        try:
            with self._admission.held():
                await self._app(scope, receive, send)
        except QueueFullError as error:
            self._count(error)
            await error_response(error)(scope, receive, send)

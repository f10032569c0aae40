"""One request's way through a fleet: an engine is picked, and another one where that one fails.

Scoring changes nothing, so a request may run twice; its client waits in one place and gets the
first answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass

from helm_engine.clock import Clock
from helm_engine.engine_choice import EngineChoice
from helm_engine.exceptions import EngineUnavailableError, QueueFullError, StepFailedError
from helm_engine.fleet_member import Engine, FleetMember
from helm_engine.request import Request

MAX_ATTEMPTS = 3
"""Engines that one request may be given to, so that what fails everywhere does not take the whole
fleet's time."""
_ELSEWHERE = (EngineUnavailableError, StepFailedError, QueueFullError)
"""Errors of an engine, and not of the request: another engine may have an answer."""
RAMP_SECONDS = 10.0
FIRST_SHARE = 0.1
"""An engine that came back holds nothing: it starts with so much of what it would be given, and
gets all of it after that time."""


@dataclass(slots=True, eq=False)
class Post:
    """A place in a fleet: the member that fills it, and how the fleet sees its engine."""

    member: FleetMember
    engine: Engine | None = None
    """As the router knows it; None while there is none."""
    has_served: bool = False
    """Whether there was an engine here before."""
    came_back: float | None = None
    """When this engine took another one's place, by the fleet's clock."""
    is_drained: bool = False
    """An operator wants it to get nothing."""
    is_suspect: bool = False
    """Its process shows no life."""
    refused: str | None = None
    """Why its engine is not used though it is there."""
    num_requests: int = 0
    """That were given to it."""

    @property
    def name(self) -> str:
        """Of its member."""
        return self.member.name

    @property
    def is_ready(self) -> bool:
        """Whether its engine can be given requests."""
        return self.engine is not None and self.refused is None

    def share(self, now: float) -> float:
        """Of the requests that the router would give it, 0..1."""
        if self.came_back is None:
            return 1.0
        return min(1.0, max(FIRST_SHARE, (now - self.came_back) / RAMP_SECONDS))


class FleetRequests:
    """Gives requests to engines and sees them through."""

    def __init__(
        self,
        choice: EngineChoice,
        open_posts: Callable[[str, Collection[str]], list[Post]],
        names: Collection[str],
        hedge_ms: float | None,
        clock: Clock,
    ) -> None:
        """Takes who decides.

        Args:
            choice: which of several engines.
            open_posts: the posts that may get a request for a model version, without those named.
            names: of all posts.
            hedge_ms: see `FleetConfig`.
            clock: that of the requests' deadlines.
        """
        self._choice = choice
        self._open_posts = open_posts
        self._names = names
        self._hedge_s = None if hedge_ms is None else hedge_ms / 1e3
        self._clock = clock
        self.num_retries = 0
        """Requests that were given to another engine because one failed them."""
        self.num_hedges = 0
        """Requests that were given to a second engine because the first took long."""
        self.num_hedges_won = 0
        """Those that the second one answered first."""

    async def run(self, request: Request, version: str) -> Request:
        """Runs one request to its end.

        Args:
            request: made for the model of that version.
            version: of the model.

        Returns:
            The request with its outcome: the same object, or a copy that another engine answered.

        Raises:
            HelmError: what the client is to be told; see `EngineClient.submit`.
            EngineUnavailableError: no engine with that model is there.
        """
        tried: set[str] = set()
        while True:
            posts = self._open_posts(version, tried)
            if not posts:
                raise EngineUnavailableError("no engine is ready")
            try:
                return await self._try(posts, request, version, tried)
            except _ELSEWHERE:
                is_late = self._clock.now() > request.deadline
                if is_late or len(tried) >= MAX_ATTEMPTS or not self._open_posts(version, tried):
                    raise
                self.num_retries += 1

    async def _try(
        self, posts: list[Post], request: Request, version: str, tried: set[str]
    ) -> Request:
        """One attempt, and a second one beside it where that is wanted and the first takes long."""
        if self._hedge_s is None or len(self._names) == 1:
            return await self._attempt(posts, request, tried)
        first = asyncio.ensure_future(self._attempt(posts, request, tried))
        running = {first}
        try:
            await asyncio.wait(running, timeout=self._hedge_s)
            if not first.done() and (others := self._open_posts(version, tried)):
                self.num_hedges += 1
                # A copy: what comes too late must not be written over the answer.
                second = self._attempt(others, copy(request), tried)
                running.add(asyncio.ensure_future(second))
            return await self._first_answer(running, first)
        finally:
            for one in running:
                one.cancel()

    async def _first_answer(
        self, running: set[asyncio.Task[Request]], first: asyncio.Task[Request]
    ) -> Request:
        """The answer that comes first, or the last error where none comes."""
        waiting = set(running)
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answered = [one for one in done if one.exception() is None]
            if answered:
                self.num_hedges_won += first not in answered
                return (first if first in answered else answered[0]).result()
            if not waiting:
                return done.pop().result()

    async def _attempt(self, posts: list[Post], request: Request, tried: set[str]) -> Request:
        """Gives a request to one of these posts, which is marked as tried."""
        if len(self._names) == 1:
            tried.add(posts[0].name)
            return await self._submit(posts[0], request)
        open_names = {post.name: post for post in posts}
        avoid = [name for name in self._names if name not in open_names]
        assert posts[0].engine is not None
        block_tokens = posts[0].engine.served.layout.block_tokens
        assignment = self._choice.pick(request, block_tokens, avoid)
        tried.add(assignment.engine)
        try:
            ended = await self._submit(open_names[assignment.engine], request)
        except (EngineUnavailableError, StepFailedError):
            self._choice.failed(assignment)
            raise
        except BaseException:
            # Refused, too late or not wanted any more: none of it is a fault of the engine.
            self._choice.abandoned(assignment)
            raise
        self._choice.finished(assignment, ended)
        return ended

    async def _submit(self, post: Post, request: Request) -> Request:
        assert post.engine is not None
        post.num_requests += 1
        return await post.engine.client.submit(request)

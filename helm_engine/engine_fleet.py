"""The engines behind one front, its own processes and those of other hosts, as one.

Who restarts, replaces or reaches an engine is its member's business; here they are watched, drained
and reloaded one after the other, and a request is given to those that serve its model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helm_engine.clock import Clock, SystemClock
from helm_engine.config import FleetConfig
from helm_engine.engine_choice import EngineChoice, load_routing_kernels
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import (
    EngineNotFoundError,
    EngineUnavailableError,
    ReloadError,
)
from helm_engine.fleet_member import CoreClient, Engine, FleetMember
from helm_engine.fleet_requests import FleetRequests, Post
from helm_engine.protocol import RecommendRequest
from helm_engine.request import Request
from helm_engine.served_model import ServedModel

logger = logging.getLogger(__name__)

_WATCH_PERIODS = 8
"""Looks at the engines within one `suspect_timeout`."""
_BACK_SECONDS = 60.0
"""That a reload waits for an engine which is being restarted."""
_POLL_SECONDS = 0.05


@dataclass(slots=True)
class _Model:
    """A model version that is served, and by whom."""

    engine: Engine
    """The first one that served it: requests are prepared with its processor."""
    posts: list[Post]


class EngineFleet:
    """Owns the members and knows at any time which of them can be given a request."""

    def __init__(
        self,
        members: Sequence[FleetMember],
        config: FleetConfig | None = None,
        seed: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            members: one at least, of different names.
            config: how requests are routed.
            seed: of choices among equals; None = drawn.
            clock: that of the requests' deadlines.

        Raises:
            ValueError: the policy is unknown.
        """
        config = config or FleetConfig()
        self._clock = clock or SystemClock()
        self._config = config
        self._posts = {member.name: Post(member) for member in members}
        self._models: dict[str, _Model] = {}
        self._choice = EngineChoice(config.policy, self._clock, seed)
        self._random = random.Random(seed)
        self.requests = FleetRequests(
            self._choice, self._open_posts, tuple(self._posts), config.hedge_ms, self._clock
        )
        """What gives requests to engines."""
        self._reloading = asyncio.Lock()
        self._rolls = False
        self._ends = False
        self._watcher: asyncio.Task[None] | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when an engine came or went."""

    # ---------------------------------------------------------------- what there is

    @property
    def posts(self) -> list[Post]:
        """All members with what is known of them, in their order."""
        return list(self._posts.values())

    @property
    def model_name(self) -> str:
        """The name under which the model is served; empty where no engine was reached yet."""
        return next((name for post in self.posts if (name := post.member.model_name)), "")

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered."""
        self.refresh()
        return bool(self._models)

    @property
    def served(self) -> ServedModel:
        """The model served; while a reload goes from engine to engine, the one that most serve.

        Raises:
            EngineUnavailableError: no engine is ready.
        """
        # Of the engine that is there now: its split may be another than that of the first one.
        engine = self._first_model().posts[0].engine
        assert engine is not None
        return engine.served

    @property
    def reports(self) -> list[EngineStats]:
        """The last report of each engine that is ready.

        Raises:
            EngineUnavailableError: none is.
        """
        if not self.is_ready:
            raise EngineUnavailableError(self._why_none())
        return [post.engine.client.stats for post in self.posts if post.engine and post.is_ready]

    @property
    def clients(self) -> list[CoreClient]:
        """All cores that hold users' KV."""
        return [client for post in self.posts for client in post.member.clients]

    @property
    def num_restarts(self) -> int:
        """Engines that died, hung or were lost, and came back."""
        return sum(post.member.num_restarts for post in self.posts)

    @property
    def capacity(self) -> int:
        """Requests that may run and wait in the engines that are there."""
        engines = [post.engine for post in self.posts if post.engine]
        return sum(one.num_cores * one.served.config.scheduler.max_num_held for one in engines)

    def describe(self) -> list[dict[str, Any]]:
        """The state of each engine, for `/info`."""
        self.refresh()
        return [_description(post) for post in self.posts]

    # ---------------------------------------------------------------- requests

    def model_for(self, body: RecommendRequest) -> Engine:
        """What a request is to be prepared with: an engine's model and its processor.

        While a reload goes from engine to engine two versions are served. Users move to the new one
        with the share of engines that have it, and do not come back.

        Raises:
            EngineUnavailableError: no engine is ready.
        """
        self.refresh()
        if len(self._models) == 1 or not self._models:
            return self._first_model().engine
        named = [one for one in self._models.values() if body.model == one.engine.served.name]
        models = named or list(self._models.values())
        place = self._place_of(body.user) * sum(len(one.posts) for one in models)
        for one in models:
            place -= len(one.posts)
            if place < 0.0:
                return one.engine
        return models[-1].engine

    def _place_of(self, user: str | None) -> float:
        """Where a user stands among all, 0..1, the same at any time."""
        return self._random.random() if user is None else zlib.crc32(user.encode()) / 2.0**32

    async def submit(self, request: Request, engine: Engine) -> Request:
        """Runs a request that was prepared with this engine's model; see `FleetRequests.run`."""
        return await self.requests.run(request, engine.served.version)

    def _first_model(self) -> _Model:
        self.refresh()
        if not self._models:
            raise EngineUnavailableError(self._why_none())
        return max(self._models.values(), key=lambda one: len(one.posts))

    def _why_none(self) -> str:
        reasons = [post.refused or post.member.why_none for post in self.posts]
        if len(reasons) == 1:
            return reasons[0]
        return f"none of {len(reasons)} engines is ready; of the first: {reasons[0]}"

    def _open_posts(self, version: str, tried: Collection[str]) -> list[Post]:
        """Those that may get a request for a model version, the better ones where there are any."""
        if self._ends:
            return []
        self.refresh()
        model = self._models.get(version)
        posts = [] if model is None else [post for post in model.posts if post.name not in tried]
        if len(posts) < 2:
            return posts
        now = self._clock.now()
        for is_better in (
            lambda post: not (post.is_drained or post.member.is_leaving),
            lambda post: not post.is_suspect,
            lambda post: post.share(now) >= 1.0 or self._random.random() < post.share(now),
        ):
            posts = [post for post in posts if is_better(post)] or posts
        return posts

    # ---------------------------------------------------------------- who is there

    def refresh(self) -> None:
        """Takes note of engines that came, went or were replaced."""
        # A list, and no generator: this is done for every request.
        changed = [post for post in self._posts.values() if post.member.current is not post.engine]
        for post in changed:
            self._change(post)
        if changed:
            self._sort_by_model()
            self.on_change()

    def _change(self, post: Post) -> None:
        if post.is_ready:
            self._leave(post)
        engine = post.engine = post.member.current
        post.is_suspect, post.refused = False, None
        if engine is None:
            return
        # The first engine of a place comes with the fleet: then all are cold.
        post.came_back = self._clock.now() if post.has_served else None
        post.refused = self._mismatch(post, engine.served)
        if post.refused is None:
            self._join(post, engine)
        else:
            logger.error("engine %s is not used: %s", post.name, post.refused)

    def _join(self, post: Post, engine: Engine) -> None:
        post.has_served, post.refused = True, None
        if len(self._posts) > 1:
            self._choice.joined(post.name, engine)

    def _leave(self, post: Post) -> None:
        if len(self._posts) > 1:
            self._choice.left(post.name)

    def _mismatch(self, post: Post, served: ServedModel) -> str | None:
        """Why an engine does not go with the others."""
        others = [
            other.engine.served
            for other in self.posts
            if other is not post and other.engine is not None and other.is_ready
        ]
        for other in others:
            if other.layout.block_tokens != served.layout.block_tokens:
                return (
                    f"block_tokens: it has {served.layout.block_tokens}, the others "
                    f"{other.layout.block_tokens}"
                )
        if self._rolls or not others or any(other.version == served.version for other in others):
            return None
        return (
            f"it serves {served.name} of version {served.version}, the others {others[0].name} of "
            f"version {others[0].version}"
        )

    def _sort_by_model(self) -> None:
        models: dict[str, _Model] = {}
        for post in self.posts:
            if post.engine is None or not post.is_ready:
                continue
            version = post.engine.served.version
            if version in models:
                models[version].posts.append(post)
            else:
                # Traces and metrics know a model by its description: it stays the same one.
                known = self._models.get(version)
                models[version] = _Model(known.engine if known else post.engine, [post])
        # Those that were served before come first: users move to new ones at the end of the line.
        order = {version: place for place, version in enumerate(self._models)}
        ranked = sorted(models, key=lambda version: order.get(version, len(order)))
        self._models = {version: models[version] for version in ranked}
        if not self._models:
            # What was refused for the sake of engines that are gone is better than nothing.
            for post in self.posts:
                if post.engine is not None and post.refused is not None:
                    self._join(post, post.engine)
                    self._sort_by_model()
                    return

    async def _watch(self) -> None:
        """Looks at the engines now and then, and takes requests away from those without life."""
        limit = self._config.suspect_timeout
        period = limit / _WATCH_PERIODS
        last = self._clock.now()
        while True:
            await asyncio.sleep(period)
            self.refresh()
            late = self._clock.now() - last
            last = self._clock.now()
            # This process slept, and perhaps the whole machine: the engines may speak first.
            if late < limit / 2:
                for post in self.posts:
                    self._look_at(post, limit)

    def _look_at(self, post: Post, limit: float) -> None:
        engine = post.engine
        if engine is None or len(self._posts) == 1:
            return
        was_suspect, silence = post.is_suspect, engine.client.silence()
        post.is_suspect = silence > limit
        if post.is_suspect and not was_suspect:
            logger.warning("engine %s has shown no life for %.1f s", post.name, silence)
        version = engine.served.version
        others = self._open_posts(version, {post.name})
        if post.is_suspect and engine.client.num_in_flight and not _all_suspect(others):
            engine.client.abandon(f"engine {post.name} shows no life")

    # ---------------------------------------------------------------- its life

    async def start(self) -> ServedModel:
        """Starts all members and watches them from then on.

        Raises what the members' `start` raises.

        Raises:
            ValueError: engines do not serve the same model.
            EngineUnavailableError: none of them could be reached.
        """
        starts = [post.member.start() for post in self.posts]
        if len(starts) > 1:
            await asyncio.gather(asyncio.to_thread(load_routing_kernels), *starts)
        else:
            await starts[0]
        self.refresh()
        for post in self.posts:
            if post.refused is not None:
                raise ValueError(f"engine {post.name}: {post.refused}")
        self._watcher = asyncio.create_task(self._watch())
        return self.served

    async def reload(self, model_dir: Path | None) -> ServedModel:
        """Replaces the model of one engine after the other; see `EngineSupervisor.reload`.

        Raises:
            ReloadError: another reload is under way, or an engine's model was not replaced; the
                message says how many were.
            EngineUnavailableError: no engine is ready.
        """
        if self._reloading.locked():
            raise ReloadError("another reload is under way")
        async with self._reloading:
            self._rolls = len(self._posts) > 1
            replaced: list[ServedModel] = []
            try:
                for post in self.posts:
                    if self._rolls:
                        await self._until_back(post)
                    replaced.append(await post.member.reload(model_dir))
                    self.refresh()
                    # One engine more than usual at a time: each has a pool of its own.
                    if self._rolls:
                        await post.member.settled()
            except (ReloadError, EngineUnavailableError) as error:
                if not replaced:
                    raise
                raise ReloadError(
                    f"{len(replaced)} of {len(self._posts)} engines serve the new model, and then: "
                    f"{error}; reload again",
                    "model_dir",
                ) from error
            finally:
                self._rolls = False
            return replaced[-1]

    async def _until_back(self, post: Post) -> None:
        """Gives an engine that is being restarted time to come back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BACK_SECONDS):
                while post.member.current is None:
                    await asyncio.sleep(_POLL_SECONDS)

    def set_drained(self, name: str, is_drained: bool) -> Post:
        """Keeps requests away from an engine, or ends that; what it has it finishes.

        With all engines drained requests go on being answered.

        Raises:
            EngineNotFoundError: there is none of that name.
        """
        if name not in self._posts:
            known = ", ".join(self._posts)
            raise EngineNotFoundError(f"engine: {name!r} is none of {known}", "engine")
        self._posts[name].is_drained = is_drained
        return self._posts[name]

    async def set_target(self, emb_fraction: float) -> None:
        """Asks all engines for another split of their pools; see `EngineSupervisor.set_target`."""
        ready = [post.member for post in self.posts if post.member.current is not None]
        if not ready:
            raise EngineUnavailableError(self._why_none())
        await asyncio.gather(*(member.set_target(emb_fraction) for member in ready))

    async def forget_user(self, user: str) -> int:
        """Drops a user's KV from every engine; returns the number of blocks.

        Raises:
            EngineUnavailableError: no engine is ready.
        """
        tag = self._first_model().engine.processor.user_tag(user)
        calls = [client.forget_user(tag) for client in self.clients]
        counts = await asyncio.gather(*calls, return_exceptions=True)
        for failure in counts:
            # An engine that is gone took its KV along.
            if isinstance(failure, BaseException) and not isinstance(
                failure, EngineUnavailableError
            ):
                raise failure
        return sum(number for number in counts if isinstance(number, int))

    def fail_pending(self, reason: str) -> None:
        """Answers all that wait with an error."""
        self._ends = True  # Else another engine would be asked.
        for post in self.posts:
            post.member.fail_pending(reason)

    async def close(self) -> bool:
        """Ends all members; whether each that was ready ended with its books in order."""
        self._ends = True
        if self._watcher is not None:
            self._watcher.cancel()
        ends = await asyncio.gather(*(post.member.close() for post in self.posts))
        self._choice.close()
        return all(ends)


def _all_suspect(posts: Sequence[Post]) -> bool:
    return all(post.is_suspect for post in posts)


def _description(post: Post) -> dict[str, Any]:
    if post.engine is None:
        return {"engine": post.name, "state": "down", "reason": post.member.why_none}
    served = post.engine.served
    state = (
        "refused" if post.refused
        else "draining" if post.is_drained or post.member.is_leaving
        else "suspect" if post.is_suspect
        else "ready"
    )  # fmt: skip
    return {
        "engine": post.name,
        "state": state,
        "reason": post.refused,
        "model": served.name,
        "model_version": served.version,
        "cores": post.engine.num_cores,
        "in_flight": post.engine.client.num_in_flight,
        "requests": post.num_requests,
    }

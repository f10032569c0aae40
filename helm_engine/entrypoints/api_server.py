"""The HTTP front: one application over engines that run in processes of their own."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from block_manager.exceptions import IntegrityError
from helm_engine.admission import Admission
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.config import EngineConfig, ServerConfig
from helm_engine.engine_fleet import EngineFleet
from helm_engine.entrypoints import admin_routes, status_routes
from helm_engine.entrypoints.api_keys import ApiKeys, KeySet
from helm_engine.entrypoints.body_limit import BodyLimit
from helm_engine.entrypoints.early_refusal import RefuseEarly
from helm_engine.entrypoints.errors import install_error_handlers
from helm_engine.entrypoints.http_server import HttpServer
from helm_engine.entrypoints.key_check import RequireApiKey
from helm_engine.entrypoints.openapi import describe
from helm_engine.entrypoints.recommend_routes import recommend_router
from helm_engine.entrypoints.request_ids import RequestIds
from helm_engine.entrypoints.tracing import Tracer
from helm_engine.exceptions import HelmError
from helm_engine.fleet_member import FleetMember
from helm_engine.fleet_members import make_members
from helm_engine.protocol import RECOMMEND_PATHS
from helm_engine.request_trace.recorder import TraceRecorder
from helm_engine.served_model import ServedModel
from helm_engine.version import __version__

logger = logging.getLogger(__name__)


class ApiFront:
    """The application, and the engines behind it."""

    def __init__(
        self,
        config: EngineConfig,
        server: ServerConfig,
        members: Sequence[FleetMember],
        announce: Callable[[ServedModel, int], None] = lambda served, num_engines: None,
    ) -> None:
        """Starts nothing yet.

        Args:
            config: of its engines; limits of requests are read from it.
            server: the front's.
            members: the engines.
            announce: called with the model and the number of engines once requests can be answered.

        Raises:
            ValueError: a key is malformed, the routing policy is unknown, or traces are wanted and
                cannot be made.
        """
        self._announce = announce
        self._fleet = EngineFleet(members, server.fleet)
        self._reloads: set[asyncio.Task[None]] = set()
        self.ended_in_order = True
        """Whether the engines' books added up when they ended."""
        endpoint = server.otlp_traces_endpoint
        tracer = Tracer.exporting_to(endpoint) if endpoint else Tracer()
        keys = ApiKeys(KeySet(server.api_keys), KeySet(server.admin_keys))
        # Last, since it makes a file that somebody has to end.
        recorder = self._recorder = (
            None
            if server.record_trace is None
            else TraceRecorder(server.record_trace, server.record_trace_max_bytes)
        )

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            try:
                self.ended_in_order = await self._fleet.close()
            finally:
                if recorder is not None:
                    await asyncio.to_thread(recorder.close)
                await asyncio.to_thread(tracer.close)

        self.app = FastAPI(title="HELM Engine", version=__version__, lifespan=lifespan)
        recommender = AsyncRecommender(self._fleet, recorder)
        self._admission = admission = Admission.to(config.scheduler)
        self._fleet.on_change = self._resize
        self.app.state.recommender = recommender
        self.app.state.admission = admission
        self.app.state.tracer = tracer
        self.app.state.is_draining = False
        self.app.add_middleware(BodyLimit, max_bytes=config.limits.max_body_bytes)
        self.app.add_middleware(
            RefuseEarly,
            admission=admission,
            paths=RECOMMEND_PATHS,
            count=recommender.metrics.count_failure,
        )
        self.app.add_middleware(RequireApiKey, keys=keys)
        self.app.add_middleware(RequestIds)
        install_error_handlers(self.app)
        self.app.include_router(recommend_router(config.limits, server.body_timeout))
        self.app.include_router(status_routes.router)
        self.app.include_router(admin_routes.router)
        self.app.openapi = lambda: describe(self.app, config.limits)  # type: ignore[method-assign]

    async def start(self) -> None:
        """Starts the engines and says so.

        Raises what `EngineFleet.start` raises, and ValueError if the trace cannot be written.
        """
        try:
            served = await self._fleet.start()
            if self._recorder is not None:
                self._recorder.begin(served)
        except BaseException:
            if self._recorder is not None:
                self._recorder.close()
            raise
        gc.collect()
        gc.freeze()
        self._announce(served, len(self._fleet.posts))

    def _resize(self) -> None:
        """Holds as many requests as may run and wait in the engines that are there."""
        # Without any the queue is that of one engine: its clients are told why there is none.
        self._admission.limit = self._fleet.capacity or self._admission.limit

    def begin_draining(self) -> None:
        """New requests are refused from now on."""
        self.app.state.is_draining = True

    @property
    def num_in_flight(self) -> int:
        """Requests between the door and their answer."""
        return self._admission.num_held

    def give_up(self) -> None:
        """Answers all that still wait with an error."""
        self._fleet.fail_pending("the server is shutting down")

    def reload(self) -> None:
        """Reads the model again; the log says how it went."""
        if self.app.state.is_draining:
            return
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            served = await self._fleet.reload(None)
        except HelmError as error:
            logger.error("%s", error)
        else:
            logger.info("reloaded %s, version %s", served.name, served.version)


def serve(
    config: EngineConfig,
    server: ServerConfig,
    bound: socket.socket,
    announce: Callable[[ServedModel, int], None],
) -> None:
    """Serves a model until SIGTERM or SIGINT.

    Args:
        config: of each engine of its own.
        server: the front's.
        bound: from `open_socket`.
        announce: called with the model and the number of engines once requests can be answered.

    Raises:
        ValueError: the model or a setting cannot be served; see `load_engine`.
        OSError: likewise.
        HelmError: the engine's process died before it was ready.
        IntegrityError: the pool's books do not add up at the end.
    """
    front = ApiFront(config, server, make_members(config, server), announce)
    http = HttpServer(
        uvicorn.Config(front.app, log_level="warning"), front, server.shutdown_timeout
    )
    http.run(sockets=[bound])
    if http.start_error is not None:
        raise http.start_error
    # A server that lost track of a page must not end as if all had been well.
    if not front.ended_in_order:
        raise IntegrityError("the engine did not end in order; its log says why")

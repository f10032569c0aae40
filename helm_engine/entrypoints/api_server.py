"""The HTTP front: one application over one engine, which runs in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from block_manager.exceptions import IntegrityError
from helm_engine.admission import Admission
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.config import EngineConfig, ServerConfig
from helm_engine.engine_client import EngineClient
from helm_engine.engine_supervisor import EngineSupervisor
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
from helm_engine.protocol import RECOMMEND_PATHS
from helm_engine.request_trace.recorder import TraceRecorder
from helm_engine.served_model import ServedModel
from helm_engine.version import __version__

logger = logging.getLogger(__name__)


class ApiFront:
    """The application, and the engine behind it."""

    def __init__(
        self,
        config: EngineConfig,
        server: ServerConfig,
        announce: Callable[[ServedModel], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            config: the engine's.
            server: the front's.
            announce: called once requests can be answered.

        Raises:
            ValueError: a key is malformed, or traces are wanted and cannot be made.
        """
        self._announce = announce
        self._supervisor = EngineSupervisor(
            config,
            lambda engine: EngineClient(engine, server.hang_timeout),
            server.start_timeout,
        )
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
                self.ended_in_order = await self._supervisor.close()
            finally:
                if recorder is not None:
                    await asyncio.to_thread(recorder.close)
                await asyncio.to_thread(tracer.close)

        self.app = FastAPI(title="HELM Engine", version=__version__, lifespan=lifespan)
        recommender = AsyncRecommender(self._supervisor, recorder)
        self._admission = admission = Admission.to(config.scheduler)
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
        """Starts the engine and says so.

        Raises what `EngineSupervisor.start` raises, and ValueError if the trace cannot be written.
        """
        try:
            served = await self._supervisor.start()
            if self._recorder is not None:
                self._recorder.begin(served)
        except BaseException:
            if self._recorder is not None:
                self._recorder.close()
            raise
        gc.collect()
        gc.freeze()
        self._announce(served)

    def begin_draining(self) -> None:
        """New requests are refused from now on."""
        self.app.state.is_draining = True

    @property
    def num_in_flight(self) -> int:
        """Requests between the door and their answer."""
        return self._admission.num_held

    def give_up(self) -> None:
        """Answers all that still wait with an error."""
        self._supervisor.fail_pending("the server is shutting down")

    def reload(self) -> None:
        """Reads the model again; the log says how it went."""
        if self.app.state.is_draining:
            return
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            served = await self._supervisor.reload(None)
        except HelmError as error:
            logger.error("%s", error)
        else:
            logger.info("reloaded %s, version %s", served.name, served.version)


def serve(
    config: EngineConfig,
    server: ServerConfig,
    bound: socket.socket,
    announce: Callable[[ServedModel], None],
) -> None:
    """Serves a model until SIGTERM or SIGINT.

    Args:
        config: the engine's.
        server: the front's.
        bound: from `open_socket`.
        announce: called once requests can be answered.

    Raises:
        ValueError: the model or a setting cannot be served; see `load_engine`.
        OSError: likewise.
        HelmError: the engine's process died before it was ready.
        IntegrityError: the pool's books do not add up at the end.
    """
    front = ApiFront(config, server, announce)
    http = HttpServer(
        uvicorn.Config(front.app, log_level="warning"), front, server.shutdown_timeout
    )
    http.run(sockets=[bound])
    if http.start_error is not None:
        raise http.start_error
    # A server that lost track of a page must not end as if all had been well.
    if not front.ended_in_order:
        raise IntegrityError("the engine did not end in order; its log says why")

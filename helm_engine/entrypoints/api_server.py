"""The HTTP front: routes, and a uvicorn server that ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from helm_engine.async_recommender import AsyncRecommender
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.entrypoints.array_route import ArrayRoute
from helm_engine.entrypoints.body_limit import BodyLimit
from helm_engine.entrypoints.errors import install_error_handlers
from helm_engine.exceptions import EngineUnavailableError, RequestAbortedError
from helm_engine.protocol import (
    ErrorBody,
    Recommendation,
    RecommendRequest,
    encode_recommendation,
)
from helm_engine.version import __version__

logger = logging.getLogger(__name__)

_CUT_OFF_SECONDS = 2
"""Time to write the last answers before connections are closed."""


def build_app(engine: LoadedEngine) -> FastAPI:
    """The application around a loaded engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.recommender = AsyncRecommender(engine, SystemClock())
        yield
        app.state.recommender.close()

    app = FastAPI(title="HELM Engine", version=__version__, lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=engine.config.limits.max_body_bytes)
    install_error_handlers(app)
    _add_recommend_routes(app)
    _add_status_routes(app, engine)
    return app


def _add_recommend_routes(app: FastAPI) -> None:
    async def recommend(body: RecommendRequest, request: Request) -> Response:
        answering = asyncio.ensure_future(app.state.recommender.recommend(body))
        leaving = asyncio.ensure_future(_client_leaves(request))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise RequestAbortedError("the client hung up")
            answer: Recommendation = answering.result()
        finally:
            # Withdraws the request, and with it its pages, if the client is gone.
            answering.cancel()
            leaving.cancel()
        return Response(encode_recommendation(answer), media_type="application/json")

    router = APIRouter(route_class=ArrayRoute)
    for path in ("/v1/recommend", "/recommend"):
        router.post(
            path,
            response_model=Recommendation,
            responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
            summary="Score candidates, or retrieve the best items of the catalogue",
            operation_id=path.strip("/").replace("/", "_"),
        )(recommend)
    app.include_router(router)


async def _client_leaves(request: Request) -> None:
    """Returns once the connection is closed; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_status_routes(app: FastAPI, engine: LoadedEngine) -> None:
    config = engine.config
    created = int(time.time())

    @app.get("/health", response_class=Response, responses={503: {"model": ErrorBody}})
    async def health() -> Response:
        """200 with an empty body while requests can be answered."""
        if not app.state.recommender.is_healthy:
            raise EngineUnavailableError("the engine has stopped")
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The engine's version."""
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Requests that run or wait."""
        scheduler = engine.core.scheduler
        return {"server_load": scheduler.num_running + scheduler.num_waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model served, in OpenAI's form, with its capabilities."""
        model = {
            "id": config.model_name,
            "object": "model",
            "created": created,
            "owned_by": "helm-engine",
            "root": config.model_dir.resolve().name,
            "parent": None,
            "max_model_len": engine.model_config.max_sequence_len,
            "dialect": engine.model_config.dialect,
            "capabilities": engine.capabilities.describe(),
        }
        return {"object": "list", "data": [model]}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """Resolved configuration and limits."""
        return {
            "version": __version__,
            "model": config.model_name,
            "model_config": engine.model_config.model_dump(),
            "limits": asdict(config.limits),
            "pool": asdict(config.pool),
            "layout": asdict(engine.layout),
            "scheduler": asdict(config.scheduler),
            "executor": asdict(config.executor),
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(app.state.recommender.metrics.render(), media_type=CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
    """Ends with exit status 0 on SIGTERM and SIGINT, and says when it can be reached."""

    def __init__(
        self, config: uvicorn.Config, announce: Callable[[], None], give_up: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._announce = announce
        self._give_up = give_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Requests that are still waiting then are answered, before uvicorn cuts them off.
        grace = self.config.timeout_graceful_shutdown or 0
        asyncio.get_running_loop().call_later(max(0, grace - _CUT_OFF_SECONDS), self._give_up)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn re-raises the signal after its shutdown, which would show as a failure.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """Binds the address before the model is loaded, so that a taken port is known at once.

    Raises:
        OSError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say they are
    # TCP; without it every answer waits 40 ms for the client's delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def serve(
    config: EngineConfig,
    bound: socket.socket,
    announce: Callable[[LoadedEngine], None],
    shutdown_timeout: int,
) -> None:
    """Loads the model and serves it until SIGTERM or SIGINT.

    Args:
        config: the engine's.
        bound: from `open_socket`.
        announce: called once the server can be reached.
        shutdown_timeout: seconds that requests in flight have to finish after the signal; then
            they are answered with 503.

    Raises:
        ValueError: the model or the configuration cannot be served; see `load_engine`.
        IntegrityError: the pool's books do not add up at the end.
    """
    engine = load_engine(config, SystemClock())
    app = build_app(engine)
    gc.collect()
    gc.freeze()
    server_config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=shutdown_timeout + _CUT_OFF_SECONDS,
    )
    server = _Server(
        server_config,
        announce=lambda: announce(engine),
        give_up=lambda: app.state.recommender.give_up(),
    )
    server.run(sockets=[bound])
    # A server that lost track of a page must not end as if all had been well.
    engine.core.check_integrity()

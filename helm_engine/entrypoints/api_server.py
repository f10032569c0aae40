"""The HTTP front: routes, and a uvicorn server that ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from helm_engine.async_recommender import AsyncRecommender
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig
from helm_engine.engine_core import LoadedEngine, load_engine
from helm_engine.entrypoints.errors import install_error_handlers
from helm_engine.exceptions import EngineDeadError
from helm_engine.protocol import ErrorBody, Recommendation, RecommendRequest
from helm_engine.recommender import build_input_processor
from helm_engine.scheduler import SchedulerStats
from helm_engine.version import __version__

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 10


def build_app(config: EngineConfig, engine: LoadedEngine) -> FastAPI:
    """The application around a loaded engine."""
    processor = build_input_processor(engine, config)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.recommender = AsyncRecommender(engine, processor, config, SystemClock())
        yield
        app.state.recommender.close()

    app = FastAPI(title="HELM Engine", version=__version__, lifespan=lifespan)
    install_error_handlers(app)
    _add_recommend_routes(app)
    _add_status_routes(app, config, engine, created)
    return app


def _add_recommend_routes(app: FastAPI) -> None:
    async def recommend(body: RecommendRequest) -> Response:
        answer: Recommendation = await app.state.recommender.recommend(body)
        return Response(answer.model_dump_json(), media_type="application/json")

    for path in ("/v1/recommend", "/recommend"):
        app.post(
            path,
            response_model=Recommendation,
            responses={status: {"model": ErrorBody} for status in (400, 404, 422, 429, 503, 504)},
            summary="Score candidates, or retrieve the best items of the catalogue",
            operation_id=path.strip("/").replace("/", "_"),
        )(recommend)


def _add_status_routes(
    app: FastAPI, config: EngineConfig, engine: LoadedEngine, created: int
) -> None:
    @app.get("/health", responses={503: {"model": ErrorBody}})
    async def health() -> Response:
        """200 with an empty body while requests can be answered."""
        if not app.state.recommender.is_healthy:
            raise EngineDeadError("the engine has stopped")
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The engine's version."""
        return {"version": __version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model served, in OpenAI's form, with its capabilities."""
        model = {
            "id": config.model_name,
            "object": "model",
            "created": created,
            "owned_by": "helm-engine",
            "root": config.model_dir.name,
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
            "pool": asdict(engine.layout),
            "scheduler": asdict(config.scheduler),
            "device": config.executor.device,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(app.state.recommender.metrics.render(), media_type=CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
    """Ends with exit status 0 on SIGTERM and SIGINT, and says when it can be reached."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

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
    config: EngineConfig, bound: socket.socket, announce: Callable[[LoadedEngine], None]
) -> None:
    """Loads the model, warms it up and serves it until SIGTERM or SIGINT.

    Args:
        config: the engine's.
        bound: from `open_socket`.
        announce: called once the server can be reached.
    """
    # Until the server has its own handler: a stop while the model loads is no failure either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    engine = load_engine(config, SystemClock())
    warm_up(config, engine)
    app = build_app(config, engine)
    gc.collect()
    gc.freeze()
    server_config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS
    )
    _Server(server_config, lambda: announce(engine)).run(sockets=[bound])


def warm_up(config: EngineConfig, engine: LoadedEngine) -> None:
    """Runs one request of each kind, so that the first client finds everything initialised."""
    processor = build_input_processor(engine, config)
    times = list(range(engine.model_config.max_sequence_len))
    history = {"item_ids": [1] * len(times), "timestamps": times}
    bodies: list[dict[str, Any]] = [{"history": history, "candidates": {"item_ids": [1]}}]
    if engine.runner.retrieval_head is not None:
        bodies.append({"history": history, "top_k": 1})
    for number, body in enumerate(bodies):
        request = RecommendRequest.model_validate(body)
        prepared = processor.process(request, f"warm-up-{number}", SystemClock().now())
        engine.core.add_request(prepared.request)
    while engine.core.has_work:
        engine.core.step()
    engine.core.scheduler.stats = SchedulerStats()

"""What is served, how it is, and how it goes."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from helm_engine.exceptions import EngineUnavailableError
from helm_engine.protocol import ErrorBody
from helm_engine.served_model import ServedModel
from helm_engine.version import __version__

router = APIRouter(responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
_STARTED = int(time.time())


@router.get("/health", response_class=Response, responses={503: {"model": ErrorBody}})
@router.get("/ping", response_class=Response, responses={503: {"model": ErrorBody}})
async def health(request: Request) -> Response:
    """200 with an empty body while requests can be answered."""
    state = request.app.state
    if state.is_draining:
        raise EngineUnavailableError("the server is shutting down")
    engine = state.recommender.supervisor.engine
    if not engine.client.is_alive:
        raise EngineUnavailableError("the engine has ended")
    return Response()


@router.get("/version")
async def version() -> dict[str, str]:
    """The engine's version."""
    return {"version": __version__}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Requests that run or wait."""
    clients = request.app.state.recommender.supervisor.clients
    return {"server_load": sum(client.num_in_flight for client in clients)}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The model served, in OpenAI's form, with its capabilities."""
    return {"object": "list", "data": [_model_card(_served(request))]}


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """Resolved configuration and limits."""
    served = _served(request)
    config = served.config
    return {
        "version": __version__,
        "model": served.name,
        "model_version": served.version,
        "model_config": served.model_config.model_dump(),
        "limits": asdict(config.limits),
        "pool": asdict(config.pool),
        "layout": asdict(served.layout),
        "memory": asdict(served.memory),
        "scheduler": asdict(config.scheduler),
        "executor": asdict(config.executor),
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    rendered = request.app.state.recommender.metrics.render()
    return Response(rendered, media_type=CONTENT_TYPE_LATEST)


def _served(request: Request) -> ServedModel:
    served: ServedModel = request.app.state.recommender.supervisor.engine.served
    return served


def _model_card(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "helm-engine",
        "root": served.config.model_dir.resolve().name,
        "parent": None,
        "max_model_len": served.model_config.max_sequence_len,
        "version": served.version,
        "dialect": served.model_config.dialect,
        "capabilities": served.capabilities.describe(),
    }

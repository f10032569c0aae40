"""What is served, how it is, and how it goes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from helm_engine.entrypoints.openapi import error_responses
from helm_engine.exceptions import EngineUnavailableError
from helm_engine.served_model import ServedModel
from helm_engine.version import __version__

router = APIRouter(responses=error_responses(500))
_NEEDS_ENGINE = error_responses(401, 503)
_STARTED = int(time.time())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model in `GET /v1/models`."""

    id: str
    """What requests may name as `model`."""
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970 at which the server started."""
    owned_by: Literal["helm-engine"] = "helm-engine"
    root: str
    """Name of the directory."""
    parent: None = None
    max_model_len: int
    """Events that the model reads at most."""
    version: str
    """Digest of weights and tables."""
    dialect: str
    capabilities: dict[str, Any]
    """What may be reused, chunked and split, each with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/health", response_class=Response, responses=error_responses(503))
@router.get("/ping", response_class=Response, responses=error_responses(503))
async def health(request: Request) -> Response:
    """200 with an empty body while requests can be answered."""
    state = request.app.state
    if state.is_draining:
        raise EngineUnavailableError("the server is shutting down")
    _ = state.recommender.fleet.served
    return Response()


@router.get("/version")
async def version() -> dict[str, str]:
    """The engine's version."""
    return {"version": __version__}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Requests that run or wait."""
    clients = request.app.state.recommender.fleet.clients
    return {"server_load": sum(client.num_in_flight for client in clients)}


@router.get("/v1/models", responses=_NEEDS_ENGINE)
async def models(request: Request) -> ModelList:
    """The model served, in OpenAI's form, with its capabilities."""
    return ModelList(data=[_model_card(_served(request))])


@router.get("/info", responses=_NEEDS_ENGINE)
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
        "memory": {**asdict(served.memory), "workspace": served.workspace},
        "scheduler": asdict(config.scheduler),
        "executor": asdict(config.executor),
        "host_tier": config.host_tier.describe(),
        "controller": asdict(config.controller),
        "engines": request.app.state.recommender.fleet.describe(),
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    rendered = request.app.state.recommender.metrics.render()
    return Response(rendered, media_type=CONTENT_TYPE_LATEST)


def _served(request: Request) -> ServedModel:
    served: ServedModel = request.app.state.recommender.fleet.served
    return served


def _model_card(served: ServedModel) -> ModelCard:
    return ModelCard(
        id=served.name,
        created=_STARTED,
        root=served.config.model_dir.resolve().name,
        max_model_len=served.model_config.max_sequence_len,
        version=served.version,
        dialect=served.model_config.dialect,
        capabilities=served.capabilities.describe(),
    )

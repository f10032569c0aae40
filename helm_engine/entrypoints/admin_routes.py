"""What changes the server: its model, the pools' boundaries, who gets requests, forgotten users."""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import fmean
from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from pydantic import BaseModel, ConfigDict, Field
from starlette.convertors import Convertor, register_url_convertor

from helm_engine.entrypoints.openapi import error_responses
from helm_engine.exceptions import EngineUnavailableError, InvalidRequestError
from helm_engine.protocol import MAX_USER_LENGTH

router = APIRouter(responses=error_responses(400, 401, 413, 500, 503))


class _AnyText(Convertor[str]):
    """A part of a path that may hold anything, slashes and line breaks too."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _AnyText())


class ReloadRequest(BaseModel):
    """Body of `POST /v1/admin/reload`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model_dir: str | None = Field(
        default=None, min_length=1, description="On the server; absent = the one served, again."
    )


class ReloadedModel(BaseModel):
    """Answer of `POST /v1/admin/reload`: what is served now."""

    model: str
    version: str


class BoundaryRequest(BaseModel):
    """Body of `PUT /v1/admin/boundary`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    emb_fraction: float = Field(
        ge=0.0, le=1.0, description="Share of the pool's pages for embedding rows."
    )


class BoundaryState(BaseModel):
    """Answer of `PUT` and `GET /v1/admin/boundary`: shares of the pool's pages, 0..1.

    With several engines shares are their means and pages their sum.
    """

    target: float
    """Asked for."""
    reachable: float
    """What floors leave of it."""
    committed: float
    """Held by embedding rows now."""
    lag_pages: int
    """Pages that embedding rows have yet to get; below 0: to give."""


class EngineState(BaseModel):
    """Answer of `POST /v1/admin/engines/{engine}:drain` and `:resume`."""

    engine: str
    draining: bool
    """Whether it gets no further requests."""
    in_flight: int
    """Requests of this server that it has yet to finish."""


class ForgottenUser(BaseModel):
    """Answer of `POST /v1/users/{user}:forget`."""

    user: str
    blocks_forgotten: int
    """KV blocks that can no longer be found."""


@router.post("/v1/admin/reload", responses=error_responses(403, 409))
async def reload(request: Request, body: ReloadRequest | None = None) -> ReloadedModel:
    """Warm a model beside the one served and put it in its place; needs the admin key.

    Requests in flight end on the model that they began on. If the new one cannot be served, the
    answer is 409 and nothing changes.
    """
    state = request.app.state
    ending = EngineUnavailableError("the server is shutting down")
    if state.is_draining:
        raise ending
    wanted = None if body is None or body.model_dir is None else Path(body.model_dir)
    try:
        served = await state.recommender.fleet.reload(wanted)
    except asyncio.CancelledError:
        # A server that ends does not wait for a model to load.
        raise ending from None
    return ReloadedModel(model=served.name, version=served.version)


@router.put("/v1/admin/boundary", responses=error_responses(403, 409))
async def set_boundary(request: Request, body: BoundaryRequest) -> BoundaryState:
    """Ask for another split of the pool; needs the admin key.

    Pages change hands between steps while requests run; `lag_pages` says how many have yet to.
    Where a controller moves the boundary, the answer is 409 and nothing changes.
    """
    await request.app.state.recommender.fleet.set_target(body.emb_fraction)
    return _boundary(request)


@router.get("/v1/admin/boundary", responses=error_responses(403))
async def get_boundary(request: Request) -> BoundaryState:
    """Where the boundary of the pool is, and where it is to be; needs the admin key."""
    return _boundary(request)


def _boundary(request: Request) -> BoundaryState:
    """The engines' last reports of their boundaries.

    Raises:
        EngineUnavailableError: no engine is ready.
    """
    reports = request.app.state.recommender.fleet.reports
    return BoundaryState(
        target=fmean(stats.emb_fraction_target for stats in reports),
        reachable=fmean(stats.emb_fraction_reachable for stats in reports),
        committed=fmean(stats.emb_fraction_committed for stats in reports),
        lag_pages=sum(stats.boundary_lag_pages for stats in reports),
    )


@router.post("/v1/admin/engines/{engine:any}:drain", responses=error_responses(403, 404))
async def drain(request: Request, engine: str) -> EngineState:
    """Give an engine no further requests; it finishes those that it has. Needs the admin key.

    With all engines drained requests go on being answered.
    """
    return _set_drained(request, engine, True)


@router.post("/v1/admin/engines/{engine:any}:resume", responses=error_responses(403, 404))
async def resume(request: Request, engine: str) -> EngineState:
    """Give a drained engine requests again; needs the admin key."""
    return _set_drained(request, engine, False)


def _set_drained(request: Request, engine: str, is_drained: bool) -> EngineState:
    post = request.app.state.recommender.fleet.set_drained(engine, is_drained)
    in_flight = sum(client.num_in_flight for client in post.member.clients)
    return EngineState(engine=engine, draining=is_drained, in_flight=in_flight)


@router.post("/v1/users/{user:any}:forget")
async def forget(
    request: Request,
    user: Annotated[str, PathParameter(min_length=1, max_length=MAX_USER_LENGTH)],
) -> ForgottenUser:
    """Drop a user's KV, also that which requests in flight are about to leave."""
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError as error:
        # The server put replacement characters there: this would be somebody else.
        raise InvalidRequestError("user: is not UTF-8", "user") from error
    number = await request.app.state.recommender.fleet.forget_user(user)
    return ForgottenUser(user=user, blocks_forgotten=number)

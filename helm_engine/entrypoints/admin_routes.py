"""What changes the server: reloading a model, moving the pool's boundary, forgetting a user."""

from __future__ import annotations

import asyncio
from pathlib import Path
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
    """Answer of `PUT` and `GET /v1/admin/boundary`: shares of the pool's pages, 0..1."""

    target: float
    """Asked for; floors may forbid to reach it."""
    committed: float
    """Held by embedding rows now."""
    lag_pages: int
    """Pages that embedding rows have yet to get; below 0: to give."""


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
        served = await state.recommender.supervisor.reload(wanted)
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
    await request.app.state.recommender.supervisor.set_target(body.emb_fraction)
    return _boundary(request)


@router.get("/v1/admin/boundary", responses=error_responses(403))
async def get_boundary(request: Request) -> BoundaryState:
    """Where the boundary of the pool is, and where it is to be; needs the admin key."""
    return _boundary(request)


def _boundary(request: Request) -> BoundaryState:
    """The engine's last report of its boundary.

    Raises:
        EngineUnavailableError: no engine is ready.
    """
    stats = request.app.state.recommender.supervisor.engine.client.stats
    return BoundaryState(
        target=stats.emb_fraction_target,
        committed=stats.emb_fraction_committed,
        lag_pages=stats.boundary_lag_pages,
    )


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
    number = await request.app.state.recommender.forget_user(user)
    return ForgottenUser(user=user, blocks_forgotten=number)

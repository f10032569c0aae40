"""`POST /v1/recommend`: one request or several, in JSON or msgpack."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from helm_engine.admission import Admission
from helm_engine.async_recommender import AsyncRecommender
from helm_engine.body_codec import (
    Encoding,
    encode_answer,
    encoding_accepted,
    encoding_of,
    parse_body,
    select_fields,
)
from helm_engine.config import RequestLimits
from helm_engine.entrypoints.openapi import error_responses
from helm_engine.entrypoints.tracing import Tracer
from helm_engine.exceptions import (
    EngineUnavailableError,
    HelmError,
    InvalidRequestError,
    RequestAbortedError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
    UploadTimeoutError,
)
from helm_engine.protocol import (
    RECOMMEND_PATHS,
    ErrorBody,
    Recommendation,
    RecommendationList,
    error_body,
    parse_request,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def recommend_router(limits: RequestLimits, body_seconds: float) -> APIRouter:
    """The routes; the application's state holds the recommender, the admission and the tracer.

    Args:
        limits: of a request.
        body_seconds: time that a client has to send a body.
    """

    async def recommend(request: Request) -> Response:
        state = request.app.state
        with state.tracer.server_span(request.url.path, request.state.parent) as span:
            request.state.trace = span.ids or request.state.trace
            try:
                if state.is_draining:
                    raise EngineUnavailableError("the server is shutting down")
                return await _Answering(request).response(limits, body_seconds)
            except HelmError as error:
                state.recommender.metrics.count_failure(error)
                raise

    router = APIRouter()
    for path in RECOMMEND_PATHS:
        router.post(
            path,
            response_model=Recommendation | RecommendationList,
            responses=error_responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
            summary="Score candidates, or retrieve the best items of the catalogue",
            operation_id=path.strip("/").replace("/", "_"),
        )(recommend)
    return router


class _Answering:
    """Answers what one HTTP request asks."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._request_id: str = request.state.request_id
        self._recommender: AsyncRecommender = request.app.state.recommender
        self._admission: Admission = request.app.state.admission
        self._tracer: Tracer = request.app.state.tracer
        self._arrived = self._recommender.clock.now()

    async def response(self, limits: RequestLimits, body_seconds: float) -> Response:
        """The whole HTTP answer."""
        encoding = _encoding_of_body(self._request)
        parsed = parse_body(await _body(self._request, body_seconds), encoding)
        several = isinstance(parsed, dict) and "requests" in parsed
        work = self.many(parsed, limits) if several else self.one(parsed, "")
        answer = await unless_client_leaves(self._request, work)
        accept = ",".join(self._request.headers.getlist("accept"))
        wanted = encoding_accepted(accept, encoding)
        return Response(encode_answer(answer, wanted), media_type=wanted.value)

    async def one(self, raw: object, suffix: str) -> Recommendation | dict[str, Any]:
        """The answer, or those parts of it that were asked for."""
        body = parse_request(raw)
        with self._tracer.request_span() as span:
            answer = await self._recommender.recommend(
                body, f"rec-{self._request_id}{suffix}", self._arrived
            )
            span.describe(answer)
        return answer if body.fields is None else select_fields(answer, body.fields)

    async def many(self, parsed: dict[Any, Any], limits: RequestLimits) -> dict[str, Any]:
        """Answers in the order of the requests, each a recommendation or an error body."""
        for name in parsed:
            if name != "requests":
                raise InvalidRequestError(f"{name}: unknown field beside requests", str(name))
        raw = parsed["requests"]
        if not isinstance(raw, list | np.ndarray) or not len(raw):
            raise InvalidRequestError("requests: must be an array of requests", "requests")
        if len(raw) > limits.max_requests:
            raise RequestTooLargeError(
                f"requests: holds {len(raw)} requests, the limit is {limits.max_requests}",
                "requests",
            )
        asked = [self._one_of_many(one, place) for place, one in enumerate(raw)]
        return {"object": "list", "data": await asyncio.gather(*asked)}

    async def _one_of_many(
        self, raw: object, place: int
    ) -> Recommendation | dict[str, Any] | ErrorBody:
        try:
            # The first one was let in at the door.
            with self._admission.held() if place else nullcontext():
                return await self.one(raw, f"-{place}")
        except HelmError as error:
            failure = error
        except Exception:
            # The others of the body have an answer.
            logger.exception("a request failed unexpectedly")
            failure = HelmError("internal error")
        self._recommender.metrics.count_failure(failure)
        return error_body(failure)


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Does the work; withdraws it, and with it the pages it holds, once the client is gone.

    Raises:
        RequestAbortedError: the client hung up.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestAbortedError("the client hung up")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _client_leaves(request: Request) -> None:
    """Returns once the connection is closed; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, seconds: float) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            return await request.body()
    except TimeoutError:
        raise UploadTimeoutError(f"body: did not come within {seconds:g} s", "body") from None
    except HTTPException as error:
        raise RequestTooLargeError(f"body: {error.detail}", "body") from None
    except ClientDisconnect:
        raise RequestAbortedError("the client hung up while it sent the request") from None


def _encoding_of_body(request: Request) -> Encoding:
    compression = request.headers.get("content-encoding", "identity")
    if compression.strip().lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"Content-Encoding: {compression!r} is not read; send the body as it is",
            "Content-Encoding",
        )
    sent = request.headers.get("content-type", Encoding.JSON.value)
    encoding = encoding_of(sent)
    if encoding is None:
        raise UnsupportedMediaTypeError(
            f"Content-Type: {sent!r} is not read; send application/json or application/msgpack",
            "Content-Type",
        )
    return encoding

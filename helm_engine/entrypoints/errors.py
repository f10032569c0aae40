"""Every error as an OpenAI error body, whoever raised it."""

from __future__ import annotations

import logging
from dataclasses import asdict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from helm_engine.entrypoints.request_ids import answer_headers
from helm_engine.exceptions import (
    AuthenticationError,
    EngineUnavailableError,
    HelmError,
    QueueFullError,
    StepFailedError,
)
from helm_engine.protocol import ErrorBody, ErrorDetail, error_body, invalid_request

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1


def error_response(error: HelmError) -> JSONResponse:
    """The HTTP answer for an error."""
    headers = {}
    if isinstance(error, QueueFullError | EngineUnavailableError | StepFailedError):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(asdict(error_body(error)), status_code=error.status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes all errors of an application OpenAI error bodies."""

    @app.exception_handler(HelmError)
    async def on_helm_error(_: Request, error: HelmError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's locations begin with where a field stands: body, path, query.
        first = error.errors()[0]
        return error_response(invalid_request([{**first, "loc": first["loc"][1:]}]))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        # Too large, or given up on by the JSON parser for its encoding or nesting.
        broken_body = error.status_code in (400, 413)
        detail = ErrorDetail(
            message=f"body: {error.detail}" if broken_body else str(error.detail),
            type="invalid_request_error" if error.status_code < 500 else "internal_error",
            param="body" if broken_body else None,
            code=error.status_code,
        )
        return JSONResponse(
            asdict(ErrorBody(error=detail)),
            status_code=error.status_code,
            headers=dict(error.headers or {}),
        )

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        ids = answer_headers(request.scope["state"])
        # This answer goes past the middleware that adds them to all others.
        logger.error("request %s failed unexpectedly", ids["X-Request-Id"], exc_info=error)
        answer = error_response(HelmError("internal error"))
        answer.headers.update(ids)
        return answer

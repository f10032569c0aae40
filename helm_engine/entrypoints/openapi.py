"""The OpenAPI description; bodies that handlers parse themselves are described here."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from helm_engine.body_codec import Encoding
from helm_engine.config import RequestLimits
from helm_engine.entrypoints.api_keys import ADMIN_PREFIX, OPEN_PATHS
from helm_engine.protocol import (
    ANSWER_FIELDS,
    RECOMMEND_PATHS,
    ErrorBody,
    RecommendRequest,
    RecommendRequests,
)

_REFERENCE = "#/components/schemas/"
_BODIES = (RecommendRequest, RecommendRequests)
_PART = "RecommendationPart"
_KEY = "apiKey"
_TRACE_PATTERN = "^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"

_TEXT = {"type": "string"}
_IDS = {
    "X-Request-Id": {"description": "The client's, or a new one.", "schema": _TEXT},
    "traceresponse": {
        "description": "Where the answer stands in the trace (W3C Trace Context).",
        "schema": {**_TEXT, "pattern": _TRACE_PATTERN},
    },
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_ERROR_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {**_TEXT, "enum": ["Bearer"]}}},
    429: _RETRY,
    503: _RETRY,
}
_ID_PARAMETERS = [
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Sent back, and part of the answer's id; one that is malformed is replaced.",
        "schema": _TEXT,
    },
    {
        "name": "traceparent",
        "in": "header",
        "description": "The client's span (W3C Trace Context); ignored where malformed.",
        "schema": _TEXT,
    },
]
_HISTORY = {"item_ids": [50, 172, 181], "timestamps": [100, 160, 220]}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "retrieve": {"user": "demo", "history": _HISTORY, "top_k": 3, "exclude_history": True},
    "score": {"history": _HISTORY, "candidates": {"item_ids": [1, 127, 100]}},
    "part": {"history": _HISTORY, "fields": ["data.item_id", "usage.cached_tokens"]},
    "several": {"requests": [{"user": "a", "history": _HISTORY}, {"history": _HISTORY}]},
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of the errors it may answer with."""
    return {
        status: {
            "model": ErrorBody,
            "description": HTTPStatus(status).phrase,
            "headers": _ERROR_HEADERS.get(status, {}),
        }
        for status in statuses
    }


def describe(app: FastAPI, limits: RequestLimits) -> dict[str, Any]:
    """The description of an application, made once.

    Args:
        app: with all its routes.
        limits: stand in the schemas.
    """
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema["components"]
        schemas = components["schemas"]
        _, bodies = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template=_REFERENCE + "{model}"
        )
        schemas.update(bodies["$defs"])
        _set_limits(schemas, limits)
        schemas[_PART] = _without_required(schemas["Recommendation"], schemas)
        of_several = schemas["RecommendationList"]["properties"]["data"]["items"]
        of_several["anyOf"].append({"$ref": _REFERENCE + _PART})
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
        for unused in ("HTTPValidationError", "ValidationError"):
            del schemas[unused]
        for path in RECOMMEND_PATHS:
            _describe_recommend(schema["paths"][path]["post"])
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                _describe_everywhere(path, operation)
        app.openapi_schema = schema
    return app.openapi_schema


def _set_limits(schemas: dict[str, Any], limits: RequestLimits) -> None:
    """What the classes cannot say: limits that the operator chose, the names of answer fields."""
    for group, most in (
        ("History", limits.max_history_events),
        ("Candidates", limits.max_candidates),
    ):
        schemas[group]["properties"]["item_ids"] |= {"minItems": 1, "maxItems": most}
    request = schemas["RecommendRequest"]["properties"]
    request["top_k"]["anyOf"][0]["maximum"] = limits.max_top_k
    request["fields"]["anyOf"][0]["items"]["enum"] = list(ANSWER_FIELDS)
    schemas["RecommendRequests"]["properties"]["requests"]["maxItems"] = limits.max_requests


def _describe_recommend(operation: dict[str, Any]) -> None:
    """Adds both encodings of the body and of the answer."""
    body = {"anyOf": [{"$ref": _REFERENCE + model.__name__} for model in _BODIES]}
    examples = {name: {"value": value} for name, value in _EXAMPLES.items()}
    operation["requestBody"] = {
        "required": True,
        "description": "In msgpack an array of integers may also be a `bin` of little-endian "
        "int64. The answer comes in what `Accept` likes best, by default in the body's encoding; "
        "errors are JSON always. Of several requests each gets an answer or an error.",
        "content": {
            encoding.value: {"schema": body, "examples": examples} for encoding in Encoding
        },
    }
    content = operation["responses"]["200"]["content"]
    answer = content["application/json"]["schema"]
    answer["anyOf"].append({"$ref": _REFERENCE + _PART})
    content[Encoding.MSGPACK.value] = {"schema": answer}


def _describe_everywhere(path: str, operation: dict[str, Any]) -> None:
    """Ids in and out, keys, and no 422: what FastAPI finds wrong is answered with 400 here."""
    operation["parameters"] = [*operation.get("parameters", []), *_ID_PARAMETERS]
    if path not in OPEN_PATHS:
        needed: dict[str, list[str]] = {_KEY: []}
        operation["security"] = [needed] if path.startswith(ADMIN_PREFIX) else [needed, {}]
    responses = operation["responses"]
    responses.pop("422", None)
    for answer in responses.values():
        answer["headers"] = {**_IDS, **answer.get("headers", {})}


def _without_required(schema: Any, components: dict[str, Any]) -> Any:
    """What an answer looks like when `fields` left parts of it out."""
    if isinstance(schema, list):
        return [_without_required(one, components) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_required(components[schema["$ref"].rpartition("/")[2]], components)
    lenient = {
        name: _without_required(value, components)
        for name, value in schema.items()
        if name != "required"
    }
    return lenient | {"additionalProperties": False} if "properties" in lenient else lenient

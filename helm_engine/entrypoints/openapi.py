"""The OpenAPI description; bodies that handlers parse themselves are described here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from helm_engine.body_codec import Encoding
from helm_engine.protocol import RecommendRequest, RecommendRequests

_REFERENCE = "#/components/schemas/"
_BODIES = (RecommendRequest, RecommendRequests)
_PART = "RecommendationPart"


def describe(app: FastAPI) -> dict[str, Any]:
    """The description of an application, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema["components"]["schemas"]
        _, bodies = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template=_REFERENCE + "{model}"
        )
        components.update(bodies["$defs"])
        components[_PART] = _without_required(components["Recommendation"], components)
        for path in ("/v1/recommend", "/recommend"):
            _describe_recommend(schema["paths"][path]["post"])
        app.openapi_schema = schema
    return app.openapi_schema


def _describe_recommend(operation: dict[str, Any]) -> None:
    """Adds both encodings of the body and of the answer."""
    body = {"anyOf": [{"$ref": _REFERENCE + model.__name__} for model in _BODIES]}
    operation["requestBody"] = {
        "required": True,
        "content": {encoding.value: {"schema": body} for encoding in Encoding},
    }
    content = operation["responses"]["200"]["content"]
    answer = content["application/json"]["schema"]
    answer["anyOf"].append({"$ref": _REFERENCE + _PART})
    content[Encoding.MSGPACK.value] = {"schema": answer}


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

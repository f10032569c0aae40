"""The server keeps what its OpenAPI description says, whatever is sent: schemathesis' cases.

`make fuzz` tries thousands of them.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import given, reject
from hypothesis import strategies as st
from schemathesis import Case, CheckContext, GenerationMode, Response
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.running_server import RunningServer

NUM_ITEMS = 60
"""Of the toy model that is served."""
MODES = list(GenerationMode)
PAGES = ("/health", "/ping", "/version", "/load", "/v1/models", "/info", "/metrics")


@schemathesis.serializer("application/msgpack")
def to_msgpack(_: Any, value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:
        reject()  # An integer beyond 64 bits, which JSON can carry.


@schemathesis.deserializer("application/msgpack")
def from_msgpack(_: Any, response: Response) -> Any:
    return msgspec.msgpack.decode(response.content)


def no_failure_of_ours(_: CheckContext, response: Response, case: Case[Any]) -> None:
    """5xx only as 504, and that only for a deadline."""
    if response.status_code >= 500:
        assert response.status_code == 504
        assert has_deadline(case.body)


def wrong_bodies_are_refused(ctx: CheckContext, response: Response, case: Case[Any]) -> bool | None:
    """Also with 413, which schemathesis does not count."""
    return None if response.status_code == 413 else negative_data_rejection(ctx, response, case)


def has_deadline(body: object) -> bool:
    return isinstance(body, dict) and "deadline_ms" in body


CHECKS = [
    no_failure_of_ours,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def description(server: RunningServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(server.address + "/openapi.json")


def operation(description: schemathesis.BaseSchema, path: str) -> APIOperation[Any, Any, Any, Any]:
    found: list[APIOperation[Any, Any, Any, Any]] = list(description[path].values())
    (only,) = found
    return only


def fits_the_model(body: Any) -> Any:
    """The body with what JSON Schema cannot say put right.

    That is known items, equal lengths, the order of times, and integers written as such: to JSON
    Schema 1.0 is one too.
    """
    if not isinstance(body, dict):
        return body
    if "requests" in body:
        return {"requests": [fits_the_model(one) for one in body["requests"]]}
    body = {name: value for name, value in body.items() if name not in ("context", "request_time")}
    body.pop("model", None)
    for name in ("top_k", "priority"):
        if body.get(name) is not None:
            body[name] = int(body[name])
    body["history"] = {
        **known_items(body["history"]),
        "timestamps": list(range(len(body["history"]["item_ids"]))),
        "start_index": int(body["history"].get("start_index", 0)),
    }
    if body.get("candidates"):
        body["candidates"] = known_items(body["candidates"])
    return body


def known_items(events: dict[str, Any]) -> dict[str, Any]:
    return {"item_ids": [int(one) % NUM_ITEMS + 1 for one in events["item_ids"]]}


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data(), path=st.sampled_from(["/v1/recommend", "/recommend"]))
def test_requests_are_answered_as_described(
    server: RunningServer,
    description: schemathesis.BaseSchema,
    path: str,
    mode: GenerationMode,
    data: st.DataObject,
) -> None:
    case = data.draw(operation(description, path).as_strategy(generation_mode=mode))
    # Several requests in one body are refused one by one, in an answer that is a success.
    several = isinstance(case.body, dict) and "requests" in case.body
    checks = CHECKS if several else [*CHECKS, wrong_bodies_are_refused]
    response = case.call_and_validate(base_url=server.address, checks=checks)
    assert response.status_code < 500 or response.status_code == 504


@given(data=st.data())
def test_requests_that_fit_the_model_are_answered(
    server: RunningServer, description: schemathesis.BaseSchema, data: st.DataObject
) -> None:
    case = data.draw(operation(description, "/v1/recommend").as_strategy())
    case.body = fits_the_model(case.body)
    response = case.call_and_validate(base_url=server.address, checks=CHECKS)
    wanted = (200, 504) if has_deadline(case.body) else (200,)
    assert response.status_code in wanted, (case.body, response.text)


@given(data=st.data(), path=st.sampled_from(PAGES))
def test_pages_are_as_described(
    server: RunningServer, description: schemathesis.BaseSchema, path: str, data: st.DataObject
) -> None:
    case = data.draw(operation(description, path).as_strategy())
    assert case.call_and_validate(base_url=server.address, checks=CHECKS).status_code == 200


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_any_user_is_forgotten_as_described(
    server: RunningServer,
    description: schemathesis.BaseSchema,
    mode: GenerationMode,
    data: st.DataObject,
) -> None:
    found = operation(description, "/v1/users/{user}:forget")
    case = data.draw(found.as_strategy(generation_mode=mode))
    response = case.call_and_validate(base_url=server.address, checks=CHECKS)
    assert response.status_code < 500


@given(data=st.data(), mode=st.sampled_from(MODES))
def test_nobody_reloads_a_server_without_an_admin_key(
    server: RunningServer,
    description: schemathesis.BaseSchema,
    mode: GenerationMode,
    data: st.DataObject,
) -> None:
    found = operation(description, "/v1/admin/reload")
    case = data.draw(found.as_strategy(generation_mode=mode))
    response = case.call_and_validate(base_url=server.address, checks=CHECKS)
    assert response.status_code == 403

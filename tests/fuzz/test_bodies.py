"""Whatever bytes come as a body: a request is made of them, or an error that can be sent."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helm_engine.body_codec import Encoding, encode_answer, parse_body
from helm_engine.exceptions import HelmError
from helm_engine.input_processor import InputProcessor
from helm_engine.protocol import MAX_ERROR_CHARACTERS, error_body, parse_request
from helm_engine.recommender import Recommender
from tests.e2e.running_server import RunningServer
from tests.fuzz.broken_bodies import broken_bodies
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

NUM_BODIES = 4000
NUM_OVER_HTTP = 300

_HISTORY = b'{"history": {"item_ids": [1], "timestamps": [1]}'
PAST_FINDS: dict[str, tuple[Encoding, bytes]] = {
    # Looked up one by one in simdjson, each key took as long as there are keys.
    "a million keys": (
        Encoding.JSON,
        _HISTORY + b', "context": {' + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}}",
    ),
    # Each got an error of its own, of which only the first is answered.
    "unknown members": (
        Encoding.JSON,
        _HISTORY + b"," + b",".join(b'"%d":1' % n for n in range(500_000)) + b"}",
    ),
    "unknown arrays": (
        Encoding.MSGPACK,
        msgspec.msgpack.encode(
            {"history": {"item_ids": [1], **dict.fromkeys(map(str, range(10**5)))}}
        ),
    ),
    "unknown fields": (Encoding.JSON, _HISTORY + b', "fields": [' + b'"x",' * 10**6 + b'"x"]}'),
    # Errors quoted it whole.
    "a long name": (Encoding.JSON, _HISTORY + b', "' + b"x" * 10**6 + b'": 1}'),
    "a long model": (Encoding.JSON, _HISTORY + b', "model": "' + b"x" * 10**6 + b'"}'),
    # These were right from the start.
    "half a surrogate pair": (Encoding.JSON, _HISTORY + b', "model": "\\ud800", "\\udfff": 1}'),
    "nested arrays": (Encoding.JSON, b"[" * 10**6),
    "nested maps": (Encoding.MSGPACK, b"\x81\xa1a" * 10**6),
    "lists of 4 billion": (Encoding.MSGPACK, b"\xdd\xff\xff\xff\xff" * 1000),
    "a map as a key": (Encoding.MSGPACK, b"\x81\x80\x01"),
    "a number of 4000 digits": (
        Encoding.JSON,
        _HISTORY + b', "deadline_ms": ' + b"1" * 4000 + b"}",
    ),
}
"""Bodies that cost too much or said too much once, and some that must go on being cheap."""


@pytest.fixture(scope="module", params=["research", "stu"])
def processor(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> InputProcessor:
    """Checks requests for a model that retrieves, and for one that reads features and context."""
    model_dir = tmp_path_factory.mktemp("models") / "toy"
    write_toy_model(model_dir, toy_config(request.param))
    engine = Recommender.from_config(toy_engine_config(model_dir)).engine
    return engine.served.input_processor(b"key of users")


def outcome(processor: InputProcessor, encoding: Encoding, raw: bytes) -> str:
    """`request`, or the field that the error names; fails on any other exception."""
    try:
        parsed = parse_body(raw, encoding)
        several = isinstance(parsed, dict) and isinstance(parsed.get("requests"), list)
        for one in parsed["requests"] if several else [parsed]:
            processor.process(parse_request(one), "id", 0.0)
    except HelmError as error:
        body = error_body(error)
        assert 400 <= body.error.code < 500
        assert len(body.error.message) <= MAX_ERROR_CHARACTERS
        for answered in Encoding:
            encode_answer(body, answered)
        return str(error.param)
    return "request"


def test_broken_bodies_end_in_errors_that_name_a_field(processor: InputProcessor) -> None:
    seen = Counter(
        outcome(processor, encoding, raw) for encoding, raw in broken_bodies(1, NUM_BODIES)
    )
    # Not all end at the same check, and not all are refused.
    assert len(seen) > 50
    assert seen["request"] > NUM_BODIES // 50
    assert seen["body"] > NUM_BODIES // 10


@given(seed=st.integers(0, 2**32))
def test_no_broken_body_escapes(processor: InputProcessor, seed: int) -> None:
    bodies = list(broken_bodies(seed, 20))
    # Anything but an error of ours would come out of `outcome` as what it is.
    assert len([outcome(processor, *body) for body in bodies]) == len(bodies)


@pytest.mark.parametrize("name", PAST_FINDS)
def test_past_finds_are_refused(processor: InputProcessor, name: str) -> None:
    # Where the time grew as the square of the size this took minutes.
    assert outcome(processor, *PAST_FINDS[name]) != "request"


def test_a_server_answers_every_broken_body(server: RunningServer) -> None:
    statuses: Counter[int] = Counter()
    bodies = [*broken_bodies(2, NUM_OVER_HTTP), *PAST_FINDS.values()]
    with httpx.Client(base_url=server.address, timeout=60) as client:
        for encoding, raw in bodies:
            headers = {"Content-Type": encoding.value}
            answer = client.post("/v1/recommend", content=raw, headers=headers)
            statuses[answer.status_code] += 1
            if answer.status_code != 200:
                error: dict[str, Any] = json.loads(answer.content)["error"]
                assert (error["code"], answer.is_client_error) == (answer.status_code, True)
    assert set(statuses) <= {200, 400, 404, 413}
    assert statuses[200] > 0 and statuses[413] > 0

"""How a body is encoded, by header; which parts of an answer are sent."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helm_engine.body_codec import (
    Encoding,
    encode_answer,
    encoding_accepted,
    encoding_of,
    select_fields,
)
from helm_engine.protocol import (
    ANSWER_FIELDS,
    Recommendation,
    RecommendedItem,
    TimingsMs,
    Usage,
)

JSON, MSGPACK = Encoding.JSON, Encoding.MSGPACK


@pytest.mark.parametrize(
    ("accept", "sent", "wanted"),
    [
        ("", JSON, JSON),
        ("", MSGPACK, MSGPACK),
        ("application/msgpack", JSON, MSGPACK),
        ("text/html, application/x-msgpack", JSON, MSGPACK),
        ("application/json, application/msgpack", MSGPACK, JSON),
        ("application/json;q=0.5, application/msgpack;q=0.8", JSON, MSGPACK),
        ("application/msgpack;q=0, */*;q=0.1", JSON, JSON),
        ("*/*, application/json;q=0.9", MSGPACK, MSGPACK),
        ("application/*", MSGPACK, MSGPACK),
        ("application/json; charset=utf-8; Q=0.2, application/msgpack;q=0.1", MSGPACK, JSON),
        ("application/msgpack;q=much", JSON, MSGPACK),
        (",;q=1,,", MSGPACK, MSGPACK),
    ],
)
def test_the_best_of_what_is_accepted_is_sent(
    accept: str, sent: Encoding, wanted: Encoding
) -> None:
    assert encoding_accepted(accept, sent) is wanted


@given(st.text(max_size=40), st.sampled_from(Encoding))
def test_any_header_leads_to_an_encoding(header: str, sent: Encoding) -> None:
    assert encoding_accepted(header, sent) in Encoding
    assert encoding_of(header) in (None, *Encoding)


def flat(value: Any, path: str = "") -> dict[str, list[Any]]:
    """Values by dotted path; items of a list one after the other."""
    found: dict[str, list[Any]] = {}
    if isinstance(value, dict):
        inner = [flat(one, f"{path}.{name}" if path else name) for name, one in value.items()]
    elif isinstance(value, list):
        inner = [flat(one, path) for one in value]
    else:
        return {path: [value]}
    for one in inner:
        for name, values in one.items():
            found.setdefault(name, []).extend(values)
    return found


WHOLE = Recommendation(
    id="rec-1",
    created=5,
    model="m",
    data=[RecommendedItem(n, n + 7, n / 2, {"click": n / 4, "data": 1.0}) for n in range(3)],
    usage=Usage(1, 2, None, 3, 4, 5, TimingsMs(1.0, 2.0, 3.0, 4.0)),
)


@given(paths=st.lists(st.sampled_from(ANSWER_FIELDS), min_size=1))
def test_selected_fields_are_exactly_those_of_the_whole_answer(paths: list[str]) -> None:
    whole = flat(msgspec.to_builtins(WHOLE))
    chosen = {
        name: values
        for name, values in whole.items()
        if any(name == path or name.startswith(path + ".") for path in paths)
    }
    part = select_fields(WHOLE, paths)
    assert flat(part) == chosen
    assert msgspec.json.decode(encode_answer(part)) == part
    assert msgspec.msgpack.decode(encode_answer(part, MSGPACK)) == part

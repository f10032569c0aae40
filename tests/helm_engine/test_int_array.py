"""Request bodies are parsed as Python's own parser would, with integer arrays as NumPy arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from helm_engine.int_array import MAX_INTEGER, parse_json, to_int_array

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, width=32) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def plain(value: Any) -> Any:
    """Arrays as lists again."""
    if isinstance(value, np.ndarray):
        assert value.dtype == np.int64
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


@given(JSON_VALUES | st.dictionaries(st.text(), st.lists(st.integers(-(2**63), 2**63 - 1))))
def test_what_is_parsed_is_what_the_standard_library_parses(value: Any) -> None:
    raw = json.dumps(value).encode()
    assert plain(parse_json(raw)) == json.loads(raw)


def test_integer_arrays_of_objects_are_numpy_arrays() -> None:
    parsed = parse_json(b'{"history": {"item_ids": [3, 1, 2], "watch": [0.5], "none": []}}')
    assert isinstance(parsed["history"]["item_ids"], np.ndarray)
    assert parsed["history"]["watch"] == [0.5]
    assert len(parsed["history"]["none"]) == 0


@pytest.mark.parametrize(
    "raw", [b'{"a": [[1, 2], [3]]}', b'{"a": [[1], [2]]}', b'{"a": [1, true]}']
)
def test_arrays_that_are_not_flat_integers_stay_as_they_are(raw: bytes) -> None:
    assert parse_json(raw) == json.loads(raw)


def test_the_last_of_equal_keys_wins() -> None:
    assert plain(parse_json(b'{"a": [1], "a": [2]}')) == {"a": [2]}


@pytest.mark.parametrize("raw", [b"", b"nope", b'{"a": [1,]}', b'{"a": ' * 100_000, b'{"a": 1} x'])
def test_what_is_not_json_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(raw)


@pytest.mark.parametrize(
    ("value", "index"),
    [
        ([1, "x"], 1),
        ([1, 2.0], 1),
        ([True, 1], 0),
        ([1, 2, MAX_INTEGER + 1], 2),
        ([1, -(2**70)], 1),
        (np.array([1, -(2**60)]), 1),
        (np.array([2**63], dtype=np.uint64), 0),
        ([[1]], 0),
        ("12", None),
        (7, None),
        (np.array([1.0]), None),
        (np.array([[1]]), None),
    ],
)
def test_what_is_no_array_of_integers_is_refused_with_the_place(
    value: object, index: int | None
) -> None:
    with pytest.raises(PydanticCustomError) as refused:
        to_int_array(value)
    assert (refused.value.context or {}).get("index") == index


@given(st.lists(st.integers(-MAX_INTEGER, MAX_INTEGER)))
def test_lists_tuples_and_arrays_become_the_same_array(values: list[int]) -> None:
    for value in (values, tuple(values), np.array(values, dtype=np.int64)):
        array = to_int_array(value)
        assert array.dtype == np.int64
        assert array.tolist() == values


def test_an_array_of_the_callers_is_copied() -> None:
    own = np.array([1, 2, 3])
    taken = to_int_array(own)
    own[:] = 0
    assert taken.tolist() == [1, 2, 3]

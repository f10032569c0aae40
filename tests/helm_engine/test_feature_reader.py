"""Every field that a model reads: what is taken over, and by which name a bad value is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from helm_engine.exceptions import InvalidRequestError
from helm_engine.feature_reader import FeatureReader
from helm_engine.history_window import window_of
from helm_engine.protocol import error_body, parse_request
from model_executor.inputs.features import RequestFeatures
from tests.toy_models import TOY_CONFIGS, toy_config

BODY: dict[str, dict[str, Any]] = {
    "history": {
        "item_ids": [7, 3, 59],
        "timestamps": [100, 160, 4000],
        "actions": [1, 0, 5],
        "category": [0, 6, 2],
    },
    "candidates": {"item_ids": [1, 40], "category": [3, 4]},
    "context": {"user_id": 4999, "device": 3},
}
"""Asks the `stu` toy: 60 items, 5-bit actions, 7 categories, 5000 users, 4 devices."""


def body_for(dialect: str) -> dict[str, Any]:
    """The same events, with what a dialect does not take left out."""
    if dialect == "stu":
        return BODY
    history = {name: BODY["history"][name] for name in ("item_ids", "timestamps", "actions")}
    return {"history": history, "candidates": {"item_ids": [1, 40]}}


def changed(body: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    """The body with one field set, or left out where the value is `...`."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    *groups, name = field.split(".")
    place = copy
    for group in groups:
        place = place[group]
    place[name] = value
    if value is ...:
        del place[name]
    return copy


def read(body: dict[str, Any], dialect: str = "stu", **changes: Any) -> RequestFeatures:
    config = toy_config(dialect, **changes)
    request = parse_request(body)
    window = window_of(config, len(request.history.item_ids), request.history.start_index)
    return FeatureReader(config).read(request, window)


def refusal(body: dict[str, Any], dialect: str = "stu", **changes: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        read(body, dialect, **changes)
    assert error.value.status == 400
    assert error.value.param is not None
    assert str(error.value).startswith(f"{error.value.param}: ")
    return error.value


# ---------------------------------------------------------------- what is taken over


def test_all_features_of_a_request_are_read() -> None:
    features = read({**BODY, "request_time": 5000})
    history, candidates = features.history, features.candidates
    assert history.item_ids.tolist() == [7, 3, 59]
    assert history.timestamps.tolist() == [100, 160, 4000]
    assert history.actions.tolist() == [1, 0, 5]
    assert history.features.tolist() == [[0], [6], [2]]
    assert candidates.item_ids.tolist() == [1, 40]
    assert candidates.features.tolist() == [[3], [4]]
    assert features.context.tolist() == [4999, 3]
    assert features.request_time == 5000


def test_features_are_in_the_order_of_the_model_and_not_of_the_sender() -> None:
    extra = [{"name": "brand", "num_rows": 90}, {"name": "category", "num_rows": 7}]
    body = changed(BODY, "context", {"device": 3, "user_id": 4999})
    body = changed(body, "history.brand", [80, 81, 82])
    features = read(changed(body, "candidates.brand", [88, 89]), features=extra)
    assert features.history.features.tolist() == [[80, 0], [81, 6], [82, 2]]
    assert features.candidates.features.tolist() == [[88, 3], [89, 4]]
    assert features.context.tolist() == [4999, 3]


def test_request_without_a_time_is_of_the_last_event() -> None:
    assert read(BODY).request_time == 4000


def test_retrieval_has_no_candidates() -> None:
    candidates = read(changed(BODY, "candidates", ...)).candidates
    assert len(candidates.item_ids) == 0
    assert candidates.features.shape == (0, 1)


@pytest.mark.parametrize(("truncation", "kept"), [("newest", slice(1, 3)), ("oldest", slice(0, 2))])
def test_all_parallel_arrays_are_cut_alike(truncation: str, kept: slice) -> None:
    history = read(BODY, max_sequence_len=2, truncation=truncation).history
    sent = BODY["history"]
    assert history.item_ids.tolist() == sent["item_ids"][kept]
    assert history.timestamps.tolist() == sent["timestamps"][kept]
    assert history.actions.tolist() == sent["actions"][kept]
    assert history.features[:, 0].tolist() == sent["category"][kept]


def test_request_time_of_a_history_cut_to_its_oldest_events_is_that_of_its_newest() -> None:
    assert read(BODY, max_sequence_len=2, truncation="oldest").request_time == 4000


@pytest.mark.parametrize("dialect", ["nvidia", "sasrec"])
def test_times_are_not_read_where_the_model_uses_none(dialect: str) -> None:
    body = changed(body_for(dialect), "history.timestamps", ...)
    features = read(body, dialect)
    assert features.history.timestamps.tolist() == [0, 0, 0]
    assert features.request_time == 0
    backwards = changed(body_for(dialect), "history.timestamps", [3, 2, 1])
    assert read({**backwards, "request_time": -7}, dialect).request_time == 0


@pytest.mark.parametrize("dialect", ["research", "sasrec"])
def test_actions_are_not_read_where_the_model_reads_none(dialect: str) -> None:
    body = changed(body_for(dialect), "history.actions", [2**50, -1, 9])
    assert read(body, dialect).history.actions.tolist() == [0, 0, 0]


def test_arrays_that_the_model_does_not_read_may_hold_anything() -> None:
    body = changed(BODY, "history.title", ["a", None, {"b": [True]}])
    assert np.array_equal(read(body).history.features, read(BODY).history.features)


@pytest.mark.parametrize("dialect", ["research", "nvidia", "sasrec"])
@pytest.mark.parametrize("context", [None, {}])
def test_context_may_be_empty_where_the_model_takes_none(
    dialect: str, context: dict[str, Any] | None
) -> None:
    assert read({**body_for(dialect), "context": context}, dialect).context.tolist() == []


@pytest.mark.parametrize("make", [tuple, np.array, lambda ids: np.array(ids, dtype=np.uint8)])
def test_tuples_and_arrays_are_read_as_lists_are(make: Callable[[list[int]], Any]) -> None:
    history = {name: make(ids) for name, ids in BODY["history"].items() if name != "timestamps"}
    history["timestamps"] = BODY["history"]["timestamps"]
    candidates = {name: make(ids) for name, ids in BODY["candidates"].items()}
    got = read({**BODY, "history": history, "candidates": candidates})
    want = read(BODY)
    assert np.array_equal(got.history.item_ids, want.history.item_ids)
    assert np.array_equal(got.history.actions, want.history.actions)
    assert np.array_equal(got.history.features, want.history.features)
    assert np.array_equal(got.candidates.features, want.candidates.features)


@pytest.mark.parametrize(
    "value",
    [
        np.array([0.0, 1.0, 2.0]),
        np.array([True, False, True]),
        np.array(["0", "1", "2"]),
        np.zeros((3, 1), dtype=np.int64),
    ],
)
@pytest.mark.parametrize("field", ["history.actions", "history.category"])
def test_array_that_holds_no_integers_is_refused_by_name(field: str, value: object) -> None:
    body = changed(BODY, field, ...)
    body["history"][field.split(".")[1]] = value
    assert refusal(body).param == field


def test_largest_values_of_every_table_are_accepted() -> None:
    body = changed(BODY, "history.actions", [31, 31, 0])
    body = changed(body, "history.category", [6, 6, 0])
    features = read(changed(body, "context", {"user_id": 4999, "device": 0}))
    assert features.history.actions.tolist() == [31, 31, 0]


# ---------------------------------------------------------------- what is refused

BAD_IDS: list[Any] = [
    *(True, 1.0, 0.5, float("nan"), "1", None, [1], {"id": 1}),
    *(-1, -(2**63), 2**63 - 1, 2**63, -(2**63) - 1, 2**70),
]
NO_LISTS: list[Any] = [7, "012", {"0": 1}, True, 0.5]
BAD_LENGTHS: list[list[int]] = [[], [0], [0, 1, 2, 3]]


@pytest.mark.parametrize("value", [*BAD_IDS, 32])
def test_bad_action_is_refused_by_place(value: object) -> None:
    assert refusal(changed(BODY, "history.actions", [0, value, 0])).param == "history.actions[1]"


@pytest.mark.parametrize("value", [*BAD_IDS, 7])
def test_bad_item_feature_of_the_history_is_refused_by_place(value: object) -> None:
    assert refusal(changed(BODY, "history.category", [0, value, 0])).param == "history.category[1]"


@pytest.mark.parametrize("value", [*BAD_IDS, 7])
def test_bad_item_feature_of_a_candidate_is_refused_by_place(value: object) -> None:
    error = refusal(changed(BODY, "candidates.category", [0, value]))
    assert error.param == "candidates.category[1]"


@pytest.mark.parametrize("field", ["history.actions", "history.category"])
def test_first_of_several_bad_ids_is_named(field: str) -> None:
    assert refusal(changed(BODY, field, [0, 99, -3])).param == f"{field}[1]"


@pytest.mark.parametrize("value", [*BAD_IDS, False, 5000])
def test_bad_contextual_feature_is_refused_by_name(value: object) -> None:
    error = refusal(changed(BODY, "context.user_id", value))
    assert error.param == "context.user_id"


@pytest.mark.parametrize(
    "field",
    [
        "history.item_ids",
        "history.timestamps",
        "history.actions",
        "history.category",
        "candidates.item_ids",
        "candidates.category",
        "context.user_id",
        "context.device",
    ],
)
def test_missing_field_is_refused_by_name(field: str) -> None:
    assert refusal(changed(BODY, field, ...)).param == field


@pytest.mark.parametrize("context", [None, {}, ...])
def test_missing_context_is_refused_by_its_first_feature(context: object) -> None:
    assert refusal(changed(BODY, "context", context)).param == "context.user_id"


@pytest.mark.parametrize("field", ["history.actions", "history.timestamps"])
def test_null_in_place_of_a_required_array_is_refused_as_missing(field: str) -> None:
    error = refusal(changed(BODY, field, None))
    assert error.param == field
    assert "required" in str(error)


@pytest.mark.parametrize("value", [None, *NO_LISTS])
@pytest.mark.parametrize("field", ["history.category", "candidates.category", "history.anything"])
def test_item_feature_that_is_no_list_is_refused_by_name(field: str, value: object) -> None:
    assert refusal(changed(BODY, field, value)).param == field


@pytest.mark.parametrize("value", NO_LISTS)
@pytest.mark.parametrize("field", ["history.actions", "history.timestamps"])
def test_array_that_is_no_list_is_refused_by_name(field: str, value: object) -> None:
    assert refusal(changed(BODY, field, value)).param == field


@pytest.mark.parametrize("value", [7, "user_id", [1, 2], True])
def test_context_that_is_no_object_is_refused_by_name(value: object) -> None:
    assert refusal(changed(BODY, "context", value)).param == "context"


@pytest.mark.parametrize("values", BAD_LENGTHS)
@pytest.mark.parametrize(
    "field", ["history.timestamps", "history.actions", "history.category", "history.anything"]
)
def test_array_of_another_length_than_the_history_is_refused_by_name(
    field: str, values: list[int]
) -> None:
    error = refusal(changed(BODY, field, values))
    assert error.param == field
    assert f"{len(values)} values" in str(error)
    assert "item_ids has 3" in str(error)


@pytest.mark.parametrize("values", BAD_LENGTHS)
@pytest.mark.parametrize("field", ["candidates.category", "candidates.anything"])
def test_array_of_another_length_than_the_candidates_is_refused_by_name(
    field: str, values: list[int]
) -> None:
    assert refusal(changed(BODY, field, values)).param == field


@pytest.mark.parametrize("name", ["age", "userid", "User_id", "item_ids", ""])
def test_unknown_contextual_feature_is_refused_by_name_with_the_known_ones(name: str) -> None:
    body = {**BODY, "context": {**BODY["context"], name: 1}}
    error = refusal(body)
    assert error.param == f"context.{name}"
    assert "user_id, device" in str(error)


@pytest.mark.parametrize("dialect", ["research", "nvidia", "sasrec"])
def test_any_context_is_refused_where_the_model_takes_none(dialect: str) -> None:
    error = refusal({**body_for(dialect), "context": {"user_id": 1}}, dialect)
    assert error.param == "context"


@pytest.mark.parametrize("group", ["history", "candidates"])
@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_unknown_items_are_refused_by_place_with_the_known_ones(dialect: str, group: str) -> None:
    first = toy_config(dialect).first_item_id
    body = body_for(dialect)
    number = len(body[group]["item_ids"])
    for item in (first - 1, first + 60, -(2**53) + 1, 2**53 - 1):
        sent = [first] * (number - 1) + [item]
        error = refusal(changed(body, f"{group}.item_ids", sent), dialect)
        assert error.param == f"{group}.item_ids[{number - 1}]"
        assert f"{first} to {first + 59}" in str(error)
    read(changed(body, f"{group}.item_ids", [first + 59] * number), dialect)


@pytest.mark.parametrize("field", ["item_ids", "timestamps", "actions", "category"])
def test_events_that_are_cut_are_checked_all_the_same(field: str) -> None:
    bad = {"item_ids": 60, "timestamps": 10**9, "actions": 32, "category": 7}[field]
    values = [bad, *BODY["history"][field][1:]]
    body = changed(BODY, f"history.{field}", values)
    error = refusal(body, max_sequence_len=1)
    # A time is wrong where the next one is smaller.
    assert error.param == f"history.{field}[{int(field == 'timestamps')}]"


@pytest.mark.parametrize("dialect", ["research", "stu"])
def test_request_before_the_last_event_is_refused(dialect: str) -> None:
    error = refusal({**body_for(dialect), "request_time": 3999}, dialect)
    assert error.param == "request_time"


def test_long_wrong_value_is_not_repeated_at_length() -> None:
    error = refusal(changed(BODY, "context.user_id", "x" * 10_000))
    assert len(str(error)) < 200


def test_a_name_that_utf8_cannot_carry_is_answered_with_its_escape() -> None:
    error = refusal({**BODY, "context": {**BODY["context"], "\ud800": 3}})
    detail = json.loads(msgspec.json.encode(error_body(error)))["error"]
    assert detail["param"] == "context.\\ud800"

"""From a request's features to tokens, dialect by dialect, and what the hashes of blocks cover."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_executor.inputs import nvidia, research, stu
from model_executor.inputs.features import Events, RequestFeatures, TokenSequence
from model_executor.inputs.registry import build_inputs
from model_executor.step import NO_ROW
from tests.toy_models import TOY_CONFIGS, toy_config

ITEMS = [7, 3, 3, 21, 59]
TIMES = [100, 160, 4000, 4001, 9000]
ACTIONS = [1, 0, 8, 5, 2]
CATEGORIES = [[0], [6], [6], [2], [1]]
ASKED_AT = 9_600


def ints(values: Any) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def make_request(
    num_events: int = 5,
    candidates: list[int] | None = None,
    context: list[int] | None = None,
    request_time: int = ASKED_AT,
    num_features: int = 1,
) -> RequestFeatures:
    """As a reader gives it: the first events of the constants above."""
    chosen = [1, 40, 3] if candidates is None else candidates
    nothing = np.zeros(len(chosen), dtype=np.int64)
    kept = slice(0, num_events)
    return RequestFeatures(
        history=Events(
            ints(ITEMS[kept]),
            ints(TIMES[kept]),
            ints(ACTIONS[kept]),
            ints(CATEGORIES[kept])[:, :num_features],
        ),
        candidates=Events(
            ints(chosen), nothing, nothing, (ints(chosen).reshape(-1, 1) % 7)[:, :num_features]
        ),
        context=ints(context or []),
        request_time=request_time,
    )


def tokens_of(dialect: str, request: RequestFeatures, **changes: Any) -> TokenSequence:
    return build_inputs(toy_config(dialect, **changes)).assemble(request)


def contextual(**sizes: int) -> list[dict[str, Any]]:
    return [{"name": name, "num_rows": size} for name, size in sizes.items()]


# ---------------------------------------------------------------- research and sasrec


def test_research_event_brings_its_time_and_the_next_events() -> None:
    tokens = tokens_of("research", make_request(num_features=0))
    assert tokens.rows.tolist() == ITEMS
    assert tokens.features[:, research.TIME].tolist() == TIMES
    assert tokens.features[:, research.NEXT_TIME].tolist() == [*TIMES[1:], ASKED_AT]
    assert tokens.candidate_rows.tolist() == [1, 40, 3]
    assert len(tokens.candidate_features) == 3


def test_last_event_of_research_waits_for_the_next_events_time() -> None:
    tokens = tokens_of("research", make_request(num_features=0))
    assert tokens.num_final == 4
    assert tokens.hash_inputs().tolist() == [
        [7, 100, 160],
        [3, 160, 4000],
        [3, 4000, 4001],
        [21, 4001, 9000],
    ]


def test_research_history_of_one_event_has_nothing_final() -> None:
    tokens = tokens_of("research", make_request(1, num_features=0))
    assert (tokens.num_final, len(tokens.hash_inputs())) == (0, 0)
    assert tokens.features.tolist() == [[100, ASKED_AT]]


def test_sasrec_event_is_its_item_alone() -> None:
    tokens = tokens_of("sasrec", make_request(num_features=0))
    assert tokens.rows.tolist() == ITEMS
    assert tokens.candidate_rows.tolist() == [1, 40, 3]
    assert tokens.num_final == 5
    assert tokens.hash_inputs().tolist() == [[item] for item in ITEMS]


# ---------------------------------------------------------------- stu


def test_stu_positions_count_from_the_newest_event_behind_the_contextual_ones() -> None:
    request = make_request(context=[2])
    tokens = tokens_of("stu", request, contextual=contextual(device=4))
    assert tokens.features[:, stu.POSITION].tolist() == [0, 6, 5, 4, 3, 2]
    assert tokens.candidate_features[:, stu.POSITION].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("num_contextual", "num_events", "context", "history", "candidates"),
    [
        (0, 3, [], [3, 2, 1], 0),
        (2, 2, [0, 1], [4, 3], 2),
        (3, 1, [0, 1, 2], [4], 3),
        (2, 5, [0, 1], [7, 6, 5, 4, 3], 2),
    ],
)
def test_stu_positions_worked_by_hand(
    num_contextual: int,
    num_events: int,
    context: list[int],
    history: list[int],
    candidates: int,
) -> None:
    sizes = {f"c{place}": 4 for place in range(num_contextual)}
    request = make_request(num_events, context=[1] * num_contextual)
    tokens = tokens_of("stu", request, contextual=contextual(**sizes))
    assert tokens.features[:, stu.POSITION].tolist() == context + history
    assert tokens.candidate_features[:, stu.POSITION].tolist() == [candidates] * 3


def test_stu_positions_beyond_the_table_share_its_last_row() -> None:
    request = make_request(context=[1, 1, 1])
    tokens = tokens_of(
        "stu", request, contextual=contextual(a=4, b=4, c=4), num_positions=3, max_candidates=1
    )
    assert tokens.features[:, stu.POSITION].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert tokens.candidate_features[:, stu.POSITION].tolist() == [2, 2, 2]


def test_stu_event_brings_its_action_and_features_and_no_context() -> None:
    tokens = tokens_of("stu", make_request(context=[2]), contextual=contextual(device=4))
    events = tokens.features[1:]
    assert tokens.rows[1:].tolist() == ITEMS
    assert events[:, stu.ACTION].tolist() == ACTIONS
    assert events[:, stu.FIRST_ITEM_FEATURE :].tolist() == CATEGORIES
    assert (events[:, stu.CONTEXT] == NO_ROW).all()


def test_stu_candidate_brings_the_requests_time_and_its_features_and_no_action() -> None:
    tokens = tokens_of("stu", make_request(context=[2]), contextual=contextual(device=4))
    candidates = tokens.candidate_features
    assert tokens.candidate_rows.tolist() == [1, 40, 3]
    assert candidates[:, stu.QUERY_TIME].tolist() == [ASKED_AT] * 3
    assert candidates[:, stu.FIRST_ITEM_FEATURE :].tolist() == [[1], [5], [3]]
    assert (candidates[:, stu.ACTION] == NO_ROW).all()
    assert (candidates[:, stu.CONTEXT] == NO_ROW).all()
    # A candidate counts as of now: its time bucket is the first.
    assert candidates[:, stu.TIME_BUCKET].tolist() == [0, 0, 0]


def test_stu_keeps_several_features_in_the_order_of_the_config() -> None:
    request = make_request(context=[2])
    both = np.stack([ints([4, 3, 2, 1, 0]), ints([0, 1, 1, 0, 1])], axis=1)
    request = replace(request, history=replace(request.history, features=both))
    request = replace(request, candidates=replace(request.candidates, features=both[:3]))
    features = [{"name": "b", "num_rows": 5}, {"name": "a", "num_rows": 2}]
    tokens = tokens_of("stu", request, contextual=contextual(device=4), features=features)
    assert np.array_equal(tokens.features[1:, stu.FIRST_ITEM_FEATURE :], both)
    assert np.array_equal(tokens.candidate_features[:, stu.FIRST_ITEM_FEATURE :], both[:3])


def test_stu_contextual_tokens_find_their_rows_in_the_pool_or_in_small_tables() -> None:
    sizes = {"device": 4, "city": 5000, "age": 3, "user": 9000, "plan": 4096}
    request = make_request(context=[2, 4999, 1, 7, 4095])
    tokens = tokens_of("stu", request, contextual=contextual(**sizes))
    # Pooled: 60 items, then 5000 cities, then users. Small: 4 devices, 3 ages, then plans.
    assert tokens.rows[:5].tolist() == [NO_ROW, 60 + 4999, NO_ROW, 60 + 5000 + 7, NO_ROW]
    rows = [2, NO_ROW, 4 + 1, NO_ROW, 4 + 3 + 4095]
    assert tokens.features[:5, stu.CONTEXT_ROW].tolist() == rows
    assert tokens.features[:5, stu.CONTEXT].tolist() == [0, 1, 2, 3, 4]
    assert (tokens.features[:5, stu.ACTION] == NO_ROW).all()


@pytest.mark.parametrize(("num_candidates", "counts"), [(64, False), (65, True)])
def test_stu_contextual_feature_is_void_below_its_smallest_sequence(
    num_candidates: int, counts: bool
) -> None:
    # The toy's user_id, pooled, asks for 70 events and candidates together; the device for none.
    request = make_request(candidates=[1] * num_candidates, context=[33, 3])
    tokens = tokens_of("stu", request, max_candidates=100)
    assert tokens.rows[:2].tolist() == [60 + 33 if counts else NO_ROW, NO_ROW]
    void = NO_ROW if counts else stu.VOID
    assert tokens.features[:2, stu.CONTEXT_ROW].tolist() == [void, 3]


def test_stu_small_contextual_feature_is_void_below_its_smallest_sequence_too() -> None:
    features = [{"name": "device", "num_rows": 4, "min_sequence_len": 9}, *contextual(age=5)]
    for candidates, row in (([1, 2, 3], stu.VOID), ([1, 2, 3, 4], 2)):
        request = make_request(candidates=candidates, context=[2, 4])
        tokens = tokens_of("stu", request, contextual=features)
        assert tokens.features[:2, stu.CONTEXT_ROW].tolist() == [row, 4 + 4]


# ---------------------------------------------------------------- time buckets of stu


def bucket_by_formula(seconds: int, largest: int) -> int:
    """In float64: floor(sqrt(max(1e-6, seconds) / 60)), capped."""
    return min(largest, math.floor(math.sqrt(max(1e-6, seconds) / 60.0)))


def is_away_from_edges(seconds: int) -> bool:
    """Whether single precision cannot take it for a time of the neighbouring bucket."""
    place = math.sqrt(max(1e-6, seconds) / 60.0)
    return abs(place - round(place)) > 1e-5 * max(1.0, place)


@given(ages=st.lists(st.integers(0, 10**9).filter(is_away_from_edges), min_size=1))
def test_stu_time_bucket_is_the_root_of_the_age_in_minutes(ages: list[int]) -> None:
    want = [bucket_by_formula(age, 10_000) for age in ages]
    assert stu.time_buckets(ints(ages), 10_000).tolist() == want


def test_stu_time_bucket_of_each_second_of_the_first_hours_is_right() -> None:
    ages = list(range(20_000))
    away = [age for age in ages if is_away_from_edges(age)]
    assert len(away) > 19_900
    want = [bucket_by_formula(age, 2048) for age in away]
    assert stu.time_buckets(ints(away), 2048).tolist() == want
    # At the edges, squares of whole minutes, single precision is exact as well.
    edges = [60 * place**2 for place in range(18)]
    assert stu.time_buckets(ints(edges), 2048).tolist() == list(range(18))


@pytest.mark.parametrize(("age", "bucket"), [(0, 0), (59, 0), (60, 1), (2**54, 40), (-5, 0)])
def test_stu_time_buckets_are_within_the_table(age: int, bucket: int) -> None:
    assert stu.time_buckets(ints([age]), 40).tolist() == [bucket]


def test_stu_ages_count_from_the_request_and_contextual_tokens_are_of_time_zero() -> None:
    request = make_request(context=[2], request_time=12_000)
    tokens = tokens_of("stu", request, contextual=contextual(device=4), num_time_buckets=100)
    ages = [12_000, *(12_000 - time for time in TIMES)]
    want = [bucket_by_formula(age, 100) for age in ages]
    assert tokens.features[:, stu.TIME_BUCKET].tolist() == want


# ---------------------------------------------------------------- nvidia


def test_nvidia_event_is_an_item_token_and_an_action_token() -> None:
    tokens = tokens_of("nvidia", make_request(num_features=0))
    assert tokens.rows.tolist() == [
        row for item in ITEMS for row in (item, NO_ROW)
    ]  # An action's vector is a small table's.
    assert tokens.features[:, nvidia.SMALL_ROW].tolist() == [
        row for action in ACTIONS for row in (NO_ROW, action)
    ]
    assert tokens.num_final == 10


def test_nvidia_event_without_actions_is_its_item() -> None:
    tokens = tokens_of("nvidia", make_request(num_features=0), action=None)
    assert tokens.rows.tolist() == ITEMS
    assert tokens.features[:, nvidia.SMALL_ROW].tolist() == [NO_ROW] * 5


@pytest.mark.parametrize("has_action", [False, True])
def test_nvidia_contextual_tokens_come_first_and_their_small_tables_behind_the_actions(
    has_action: bool,
) -> None:
    changes: dict[str, Any] = {} if has_action else {"action": None}
    sizes = {"device": 4, "city": 5000, "age": 3, "user": 9000}
    request = make_request(2, context=[2, 4999, 1, 7], num_features=0)
    tokens = tokens_of("nvidia", request, contextual=contextual(**sizes), **changes)
    behind = 9 if has_action else 0
    assert tokens.rows[:4].tolist() == [NO_ROW, 60 + 4999, NO_ROW, 60 + 5000 + 7]
    small = tokens.features[:, nvidia.SMALL_ROW]
    assert small[:4].tolist() == [behind + 2, NO_ROW, behind + 4 + 1, NO_ROW]
    events = [7, NO_ROW, 3, NO_ROW] if has_action else [7, 3]
    assert tokens.rows[4:].tolist() == events


def test_nvidia_candidate_is_its_item_alone() -> None:
    tokens = tokens_of("nvidia", make_request(num_features=0))
    assert tokens.candidate_rows.tolist() == [1, 40, 3]
    assert tokens.candidate_features.tolist() == [[NO_ROW]] * 3


# ---------------------------------------------------------------- all dialects

READ: dict[str, set[str]] = {
    "research": {"item_ids", "timestamps"},
    "stu": {"item_ids", "timestamps", "actions", "features", "request_time", "context"},
    "nvidia": {"item_ids", "actions", "context"},
    "sasrec": {"item_ids"},
}
CHANGES: dict[str, dict[str, Any]] = {
    "nvidia": {"contextual": contextual(user=9000, device=4)},
    "stu": {"contextual": contextual(user=9000, device=4), "num_time_buckets": 4096},
}


def request_for(dialect: str, num_events: int = 5) -> RequestFeatures:
    context = [5, 2] if "context" in READ[dialect] else []
    return make_request(num_events, context=context, num_features=int(dialect == "stu"))


def hashed(dialect: str, request: RequestFeatures) -> list[list[int]]:
    rows: list[list[int]] = (
        tokens_of(dialect, request, **CHANGES.get(dialect, {})).hash_inputs().tolist()
    )
    return rows


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("field", ["item_ids", "timestamps", "actions", "features"])
@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_hashes_cover_what_a_model_reads_of_each_event_and_nothing_else(
    dialect: str, field: str, place: int
) -> None:
    request = request_for(dialect)
    values = getattr(request.history, field).copy()
    # A time moves by enough for another bucket. The events' order does not matter here.
    values[place : place + 1] += 4000 if field == "timestamps" else 1
    changed = replace(request, history=replace(request.history, **{field: values}))
    before, after = hashed(dialect, request), hashed(dialect, changed)
    if field not in READ[dialect]:
        assert before == after
        return
    differing = [row for row, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    own_rows = {"nvidia": [2 + 2 * place, 3 + 2 * place], "stu": [2 + place]}.get(dialect, [place])
    assert set(differing) & set(own_rows)
    # The event before reads this one's time as well, in the dialect that has relative times.
    assert min(differing) >= min(own_rows) - (dialect == "research" and field == "timestamps")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("dialect", ["stu", "nvidia"])
def test_hashes_cover_each_contextual_feature_before_all_events(dialect: str, place: int) -> None:
    request = request_for(dialect)
    context = request.context.copy()
    context[place] += 1
    before, after = hashed(dialect, request), hashed(dialect, replace(request, context=context))
    assert [row for row in range(len(before)) if before[row] != after[row]] == [place]


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_hashes_cover_the_requests_time_where_rows_depend_on_it(dialect: str) -> None:
    request = request_for(dialect)
    later = replace(request, request_time=ASKED_AT + 100_000)
    differs = hashed(dialect, request) != hashed(dialect, later)
    assert differs == ("request_time" in READ[dialect])


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_hashes_do_not_cover_candidates(dialect: str) -> None:
    request = request_for(dialect)
    other = make_request(
        candidates=[50, 2], context=request.context.tolist(), num_features=int(dialect == "stu")
    )
    assert hashed(dialect, request) == hashed(dialect, other)


def test_hashes_of_stu_cover_whether_a_contextual_feature_counts() -> None:
    few, many = (
        tokens_of("stu", make_request(candidates=[1] * number, context=[0, 0]), max_candidates=99)
        for number in (64, 65)
    )
    differing = np.flatnonzero((few.hash_inputs() != many.hash_inputs()).any(axis=1))
    assert differing.tolist() == [0]


@pytest.mark.parametrize(
    ("dialect", "keeps"), [("research", True), ("stu", False), ("nvidia", True), ("sasrec", True)]
)
def test_hashes_of_a_growing_history_stay_those_of_its_beginning(dialect: str, keeps: bool) -> None:
    shorter, longer = (
        hashed(dialect, request_for(dialect, 4)),
        hashed(dialect, request_for(dialect)),
    )
    assert (longer[: len(shorter)] == shorter) == keeps


@pytest.mark.parametrize("num_candidates", [0, 3])
@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_shapes_are_those_of_tokens_and_candidates(dialect: str, num_candidates: int) -> None:
    request = make_request(
        candidates=[1, 40, 3][:num_candidates],
        context=[5, 2] if "context" in READ[dialect] else [],
        num_features=int(dialect == "stu"),
    )
    tokens = tokens_of(dialect, request, **CHANGES.get(dialect, {}))
    length, width = tokens.features.shape
    assert tokens.rows.shape == (length,)
    assert tokens.candidate_rows.shape == (num_candidates,)
    assert tokens.candidate_features.shape == (num_candidates, width)
    assert tokens.num_final <= length
    for array in (tokens.rows, tokens.features, tokens.candidate_rows, tokens.candidate_features):
        assert array.dtype == np.int64

"""Distinct rows of a step against the obvious way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_manager.distinct_rows import NO_ROW, DistinctRows

NUM_ROWS = 20


@given(st.lists(st.lists(st.integers(NO_ROW, NUM_ROWS - 1), max_size=40), max_size=4))
def test_rows_are_told_apart_call_after_call(calls: list[list[int]]) -> None:
    distinct = DistinctRows(NUM_ROWS)
    for rows in calls:
        found = distinct.of(np.array(rows, dtype=np.int64))
        want = list(dict.fromkeys(row for row in rows if row != NO_ROW))
        assert found.row_ids.tolist() == want
        assert found.counts.tolist() == [rows.count(row) for row in want]
        assert found.places.tolist() == [
            NO_ROW if row == NO_ROW else want.index(row) for row in rows
        ]


def test_a_row_beyond_the_last_is_refused() -> None:
    with pytest.raises(IndexError, match="row 20"):
        DistinctRows(NUM_ROWS).of(np.array([3, NUM_ROWS]))


@given(
    st.lists(
        st.lists(st.lists(st.integers(NO_ROW, NUM_ROWS - 1), max_size=20), min_size=1, max_size=4),
        max_size=4,
    ),
    st.sets(st.integers(0, NUM_ROWS - 1)),
)
def test_rows_of_each_part_are_counted_call_after_call(
    calls: list[list[list[int]]], resident: set[int]
) -> None:
    distinct = DistinctRows(NUM_ROWS)
    slots = np.array([row if row in resident else -1 for row in range(NUM_ROWS)], dtype=np.int32)
    for parts in calls:
        rows = np.array([row for part in parts for row in part], dtype=np.int64)
        needed = [set(part) - {NO_ROW} for part in parts]
        counted = distinct.count(rows, [len(part) for part in parts], slots)
        assert counted.tolist() == [[len(one), len(one & resident)] for one in needed]
        assert distinct.of(rows).row_ids.size == len(set().union(*needed))


def test_a_row_beyond_the_last_is_not_counted() -> None:
    distinct, slots = DistinctRows(NUM_ROWS), np.zeros(NUM_ROWS, dtype=np.int32)
    with pytest.raises(IndexError, match="row 20"):
        distinct.count(np.array([3, NUM_ROWS]), [2], slots)
    assert distinct.count(np.array([3]), [1], slots).tolist() == [[1, 1]]

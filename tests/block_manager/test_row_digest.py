"""The row digest against counting in plain Python, and the rows' log against the slot table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_manager.events import RowEventBatch, RowsCleared, RowsRemoved, RowsStored
from block_manager.exceptions import IntegrityError
from block_manager.row_digest import (
    RowDigest,
    pack_positions,
    position_of_row,
    position_of_rows,
    unpack_positions,
)
from block_manager.row_log import RowLog, RowTraffic
from tests.router.deviceless_engine import NUM_POSITIONS, NUM_ROWS, Books
from tests.router.holdings import Holdings

GOLDEN = 0x9E3779B97F4A7C15


def rows_of(*rows: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=20),
    st.integers(1, 2**31),
    st.integers(1, 2**32),
)
def test_positions_are_rows_or_their_fibonacci_hash(
    rows: list[int], num_rows: int, num_positions: int
) -> None:
    rows = [row % num_rows for row in rows]
    expected = rows
    if num_rows > num_positions:
        expected = [((row * GOLDEN % 2**64) >> 32) * num_positions >> 32 for row in rows]
    found = position_of_rows(rows_of(*rows), num_rows, num_positions)
    assert found.dtype == np.uint32
    assert found.tolist() == expected
    assert [int(position_of_row(row, num_rows, num_positions)) for row in rows] == expected


def test_neighbours_are_spread_evenly() -> None:
    """As popular rows are: of a table four times as large as the digest, its first part."""
    positions = position_of_rows(np.arange(1 << 10), 1 << 14, 1 << 12)
    assert len(np.unique(positions)) == 1 << 10


@given(st.integers(0, 2**32), st.sampled_from([1, 7, 64, NUM_ROWS, 1000]))
def test_changes_are_those_of_the_set_of_resident_positions(seed: int, limit: int) -> None:
    rng, digest = np.random.default_rng(seed), RowDigest(NUM_ROWS, limit)
    resident: set[int] = set()
    said: set[int] = set()
    for _ in range(12):
        came: Counter[int] = Counter()
        went: Counter[int] = Counter()
        for row in rng.integers(0, NUM_ROWS, int(rng.integers(0, 80))).tolist():
            (went if row in resident else came)[row] += 1
            resident ^= {row}
        parts = np.array_split(rows_of(*rng.permutation([*came.elements()])), 3)
        gone = rows_of(*went.elements()).astype(np.int32)
        changes = digest.change(RowTraffic(list(parts), [gone]))
        expected = set(position_of_rows(rows_of(*resident), NUM_ROWS, limit).tolist())
        assert changes.stored.tolist() == sorted(expected - said)
        assert changes.removed.tolist() == sorted(said - expected)
        said = expected
        assert digest.resident().tolist() == sorted(expected)


def test_a_row_that_went_without_coming_is_an_error() -> None:
    digest = RowDigest(10, 4)
    digest.change(RowTraffic([rows_of(1)], []))
    with pytest.raises(IntegrityError, match="was not there"):
        digest.change(RowTraffic([], [rows_of(1, 1)]))


def test_positions_travel_as_little_endian_words() -> None:
    packed = pack_positions(np.array([1, 258, 2**32 - 1], dtype=np.uint32))
    assert packed == b"\1\0\0\0\2\1\0\0\xff\xff\xff\xff"
    assert unpack_positions(packed).tolist() == [1, 258, 2**32 - 1]
    with pytest.raises(ValueError, match="buffer size"):
        unpack_positions(packed[:-1])


def test_changes_and_snapshots_are_events() -> None:
    digest = RowDigest(10, 10)
    assert digest.change(RowTraffic([], [])).events() == []
    added = digest.change(RowTraffic([rows_of(3, 1)], [])).events()
    assert added == [RowsStored(b"\1\0\0\0\3\0\0\0")]
    both = digest.change(RowTraffic([rows_of(2)], [rows_of(3)])).events()
    assert both == [RowsRemoved(b"\3\0\0\0"), RowsStored(b"\2\0\0\0")]
    (cleared,), (stored,) = digest.snapshot_events()
    assert cleared == RowsCleared()
    assert stored == RowsStored(b"\1\0\0\0\2\0\0\0")


@given(st.integers(0, 2**32), st.integers(1, 120))
def test_the_log_adds_up_to_the_slot_table(seed: int, number: int) -> None:
    """Loads, failed loads, evictions, refills, and pages that come and go."""
    books, rng = Books(), np.random.default_rng(seed)
    log = books.emb.row_log = RowLog()
    digest, sink = RowDigest(NUM_ROWS, NUM_POSITIONS), Holdings()
    for _ in range(number):
        books.act(rng)
        if not rng.integers(0, 3):
            events = digest.change(log.take()).events()
            sink.apply_rows("", RowEventBatch(0.0, events, NUM_POSITIONS))
            assert sink.positions("") == books.positions()
    digest.change(log.take())
    assert set(digest.resident().tolist()) == books.positions()

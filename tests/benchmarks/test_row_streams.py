"""The streams on which the row policy is measured have the properties that their names promise."""

from __future__ import annotations

import numpy as np

from benchmarks.cache_yardsticks import Int64Array, Stream
from benchmarks.row_streams import (
    SCAN_EVERY,
    SCAN_LENGTH,
    STEP_LOOKUPS,
    ZIPF_ROWS,
    drift,
    in_steps,
    ml100k_events,
    ml100k_histories,
    scan,
    sudden_change,
    zipf,
)
from tests.benchmarks.invented_ratings import invented_ratings

DATASET = invented_ratings(num_users=30)


def uses(stream: Stream, first: float = 0.0, last: float = 1.0) -> Int64Array:
    """How often each row is used within a part of the steps."""
    counts = np.zeros(stream.num_rows, dtype=np.int64)
    number = len(stream.steps)
    for step in stream.steps[int(first * number) : int(last * number)]:
        counts[step.row_ids] += step.times
    return counts


def test_a_step_says_each_row_once_with_how_often_it_is_used() -> None:
    stream = in_steps(np.array([5, 2, 5, 7, 7, 7, 2]), num_rows=8, lookups=4)
    assert [step.row_ids.tolist() for step in stream.steps] == [[5, 2, 7], [7, 2]]
    assert [step.times.tolist() for step in stream.steps] == [[2, 1, 1], [2, 1]]
    assert (stream.num_lookups, stream.num_distinct) == (5, 3)


def test_events_of_movielens_are_all_there_once() -> None:
    counts = np.bincount(DATASET.item_ids, minlength=DATASET.num_items + 1)
    assert uses(ml100k_events(DATASET)).tolist() == counts.tolist()


def test_histories_of_movielens_are_looked_up_whole_after_every_ten_events() -> None:
    lengths = sorted(int(step.times.sum()) for step in ml100k_histories(DATASET).steps)
    events = np.diff(DATASET.user_offsets).tolist()
    visits = [min(length, 200) for total in events for length in range(10, total + 1, 10)]
    assert lengths == sorted(visits)


def test_a_larger_exponent_has_the_hotter_head() -> None:
    heads = [np.sort(uses(zipf(s, 50_000, seed=1)))[-1000:].sum() for s in (0.8, 1.0, 1.2)]
    assert heads == sorted(heads)
    assert uses(zipf(1.0, 50_000, seed=1)).max() / 50_000 > 0.05


def test_a_stream_is_a_function_of_its_seed() -> None:
    first, again, other = (uses(zipf(1.0, 5_000, seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_hot_rows_are_others_after_the_sudden_change() -> None:
    stream = sudden_change(50_000, seed=1)
    before, after = uses(stream, 0.0, 0.5), uses(stream, 0.5, 1.0)
    assert not set(np.argsort(before)[-5:].tolist()) & set(np.argsort(after)[-5:].tolist())


def test_a_scan_uses_rows_in_a_row_that_nobody_else_uses() -> None:
    counts = uses(scan(2 * SCAN_EVERY, seed=1))
    scanned = np.flatnonzero(counts[ZIPF_ROWS:])
    assert scanned.tolist() == [*range(2 * SCAN_LENGTH)]
    assert counts[:ZIPF_ROWS].sum() == 2 * SCAN_EVERY


def test_new_items_go_on_appearing_where_the_catalogue_drifts() -> None:
    stream = drift(60_000, seed=1)
    late_items = np.flatnonzero(uses(stream, 0.0, 0.8) == 0)
    # Items that never came before take a good share of what is used at the end.
    assert uses(stream, 0.8)[late_items].sum() > 0.15 * uses(stream, 0.8).sum()
    assert all(step.times.sum() <= STEP_LOOKUPS for step in stream.steps)

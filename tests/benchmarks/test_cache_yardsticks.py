"""The yardsticks of the row policy against naive caches, and the optimum against every choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cache_yardsticks import Step, Stream, lfu_hits, lru_hits, optimal_hits
from benchmarks.row_policy import POLICIES

NUM_ROWS = 7
batches = st.lists(
    st.dictionaries(st.integers(0, NUM_ROWS - 1), st.integers(1, 3), min_size=1, max_size=4),
    min_size=1,
    max_size=9,
)
"""Distinct rows of each step, and how often it uses each."""
capacities = st.integers(1, 5)

Batch = dict[int, int]


def stream_of(steps: list[Batch]) -> Stream:
    return Stream(NUM_ROWS, [Step(np.array([*step]), np.array([*step.values()])) for step in steps])


def naive_hits(
    steps: list[Batch], capacity: int, worth: Callable[[int, int], tuple[int, ...]]
) -> list[int]:
    """Keeps the rows of most worth, which is asked for after the numbered step."""
    resident: set[int] = set()
    hits = []
    for number, step in enumerate(steps):
        hits.append(len(resident & step.keys()))
        known = sorted(resident | step.keys(), key=lambda row: worth(row, number), reverse=True)
        resident = set(known[:capacity])
    return hits


def last_use(steps: list[Batch], row: int, number: int) -> tuple[int, int]:
    return max(
        (at, [*step].index(row)) for at, step in enumerate(steps[: number + 1]) if row in step
    )


@given(steps=batches, capacity=capacities)
def test_lru_keeps_the_rows_used_last(steps: list[Batch], capacity: int) -> None:
    expected = naive_hits(steps, capacity, lambda row, number: last_use(steps, row, number))
    assert lru_hits(stream_of(steps), capacity).tolist() == expected


@given(steps=batches, capacity=capacities)
def test_lfu_keeps_the_rows_used_most_often(steps: list[Batch], capacity: int) -> None:
    def worth(row: int, number: int) -> tuple[int, ...]:
        uses = sum((Counter(step) for step in steps[: number + 1]), Counter[int]())
        return (uses[row], *last_use(steps, row, number))

    assert lfu_hits(stream_of(steps), capacity).tolist() == naive_hits(steps, capacity, worth)


def most_hits(steps: list[Batch], capacity: int) -> int:
    """Tries every set of rows that could be kept after every step."""

    @cache
    def from_step(number: int, resident: frozenset[int]) -> int:
        if number == len(steps):
            return 0
        known = resident | steps[number].keys()
        kept = min(capacity, len(known))
        choices = (from_step(number + 1, frozenset(one)) for one in combinations(known, kept))
        return len(resident & steps[number].keys()) + max(choices)

    return from_step(0, frozenset())


@given(steps=batches, capacity=st.integers(1, 3))
def test_optimum_hits_as_often_as_the_best_of_all_choices(
    steps: list[Batch], capacity: int
) -> None:
    assert optimal_hits(stream_of(steps), capacity).sum() == most_hits(steps, capacity)


@given(steps=batches, capacity=capacities)
def test_no_policy_hits_more_often_than_the_optimum(steps: list[Batch], capacity: int) -> None:
    stream = stream_of(steps)
    most = optimal_hits(stream, capacity).sum()
    assert all(hits_of(stream, capacity).sum() <= most for hits_of in POLICIES.values())


def test_all_policies_hit_every_known_row_where_every_row_has_a_slot() -> None:
    steps: list[Batch] = [{0: 1, 1: 2}, {1: 1, 2: 1}, {0: 1, 1: 1, 2: 1}]

    hits = [hits_of(stream_of(steps), NUM_ROWS).tolist() for hits_of in POLICIES.values()]
    assert hits == [[0, 1, 3]] * len(POLICIES)

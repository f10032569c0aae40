"""Histories put together of first histories and what joined them; candidates without equal ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from helm_engine.simulator.events.law import Int64Array

_NOBODY = -1


def distinct_items(items: Int64Array, bounds: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Distinct items of each bag, ascending, as the engine's front merges equal candidates.

    Args:
        items: of all bags, int64 [draws].
        bounds: where each bag begins, and the last ends, int64 [bags + 1].

    Returns:
        The items that are left, int64 [m], and where each bag begins and the last ends.
    """
    # All bags at once: one long sort is several times as fast as many short ones.
    most = int(items.max(initial=0)) + 1
    bags = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    ordered = np.sort(bags * most + items)
    kept: tuple[Int64Array, Int64Array] = _drop_repeats(ordered, bounds, most)
    return kept


@njit(nogil=True, cache=True)
def _drop_repeats(ordered: Any, bounds: Any, most: Any) -> Any:
    kept, new_bounds = np.empty_like(ordered), np.empty_like(bounds)
    number = 0
    for bag in range(len(bounds) - 1):
        new_bounds[bag] = number
        for place in range(bounds[bag], bounds[bag + 1]):
            if place == 0 or ordered[place] != ordered[place - 1]:
                kept[number] = ordered[place] - bag * most
                number += 1
    new_bounds[-1] = number
    return kept[:number].copy(), new_bounds


@njit(nogil=True, cache=True)
def fill_histories(
    people: Any,
    lengths: Any,
    bounds: Any,
    first_items: Any,
    candidates: Any,
    candidate_bounds: Any,
    starts: Any,
) -> Any:
    """Events of all people, one person after the other: the first history, then what joined it.

    Args:
        people: of each visit, in the order of their first visits, int64 [n].
        lengths: of the history at each visit, int64 [n].
        bounds: where each person's first history begins in `first_items`, and the last ends.
        first_items: int64 [sum of first histories].
        candidates: drawn at each visit; the first of them join the history, int64 [draws].
        candidate_bounds: where each visit's begin, and the last's end, int64 [n + 1].
        starts: where each person's events begin, and the last's end, int64 [people + 1].
    """
    events = np.empty(starts[-1], dtype=np.int64)
    last_visit = np.full(len(starts) - 1, _NOBODY, dtype=np.int64)
    for visit in range(len(people)):
        person, start = people[visit], starts[people[visit]]
        before = last_visit[person]
        if before == _NOBODY:
            first = first_items[bounds[person] : bounds[person + 1]]
            events[start : start + len(first)] = first
        else:
            joined = lengths[visit] - lengths[before]
            shown = candidate_bounds[before]
            begin = start + lengths[before]
            events[begin : begin + joined] = candidates[shown : shown + joined]
        last_visit[person] = visit
    return events

"""Compiled operations on the books of embedding rows: lookup, eviction, and pages that leave.

Each is one pass over slots or rows. Slots and rows are int64 [n]; the arrays that they index belong
to `EmbeddingCache`. Hotness is a byte, so nothing here compares its way through a sort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from block_manager.row_plan import NOWHERE

_NUM_HEATS = 256
_SPARED = -1


@njit(nogil=True, cache=True)
def are_within(row_ids: Any, num_rows: Any) -> Any:
    """Whether every row is one of the table's."""
    # Without their sign, rows below 0 are the largest of all.
    largest = np.uint64(0)
    for place in range(len(row_ids)):
        largest = max(largest, np.uint64(row_ids[place]))
    return len(row_ids) == 0 or largest < np.uint64(num_rows)


@njit(nogil=True, cache=True)
def find(row_ids: Any, slot_of_row: Any) -> Any:
    """Slots of rows, NOWHERE for absent ones."""
    slots = np.empty(len(row_ids), dtype=np.int64)
    for place in range(len(row_ids)):
        slots[place] = slot_of_row[row_ids[place]]
    return slots


@njit(nogil=True, cache=True)
def use(row_ids: Any, slot_of_row: Any, last_use: Any, step: Any) -> Any:
    """Looks up distinct rows and marks the slots of those that are resident as used by the step.

    Returns:
        Slots, int64 [n]; which rows are resident, bool [n]; how many are not.
    """
    slots = find(row_ids, slot_of_row)
    resident = np.empty(len(row_ids), dtype=np.bool_)
    num_missing = 0
    for place in range(len(row_ids)):
        resident[place] = slots[place] != NOWHERE
        num_missing += slots[place] == NOWHERE
    for slot in slots:
        if slot != NOWHERE:
            last_use[slot] = step
    return slots, resident, num_missing


@njit(nogil=True, cache=True)
def settle(row_ids: Any, slots: Any, slot_of_row: Any, row_of_slot: Any) -> None:
    """Rows can be found in slots from now on."""
    for i in range(len(slots)):
        slot_of_row[row_ids[i]] = slots[i]
        row_of_slot[slots[i]] = row_ids[i]


@njit(nogil=True, cache=True)
def evict(slots: Any, slot_of_row: Any, row_of_slot: Any) -> None:
    """Forgets the rows of slots."""
    for slot in slots:
        slot_of_row[row_of_slot[slot]] = NOWHERE
        row_of_slot[slot] = NOWHERE


@njit(nogil=True, cache=True)
def move(
    sources: Any, destinations: Any, slot_of_row: Any, row_of_slot: Any, last_use: Any
) -> None:
    """Rows are elsewhere from now on; the destinations hold none."""
    for i in range(len(sources)):
        row = row_of_slot[sources[i]]
        row_of_slot[sources[i]] = NOWHERE
        row_of_slot[destinations[i]] = row
        slot_of_row[row] = destinations[i]
        last_use[destinations[i]] = last_use[sources[i]]


@njit(nogil=True, cache=True)
def vacate(
    page_ids: Any, rows_per_page: Any, slot_of_row: Any, row_of_slot: Any, counts: Any
) -> Any:
    """Forgets the rows of pages that nobody asked for of late.

    Returns:
        Slots that still hold a row; slots that held none; how many rows were forgotten.
    """
    warm = np.empty(len(page_ids) * rows_per_page, dtype=np.int64)
    vacant = np.empty_like(warm)
    num_warm = num_vacant = num_cold = 0
    for page in page_ids:
        for slot in range(page * rows_per_page, (page + 1) * rows_per_page):
            row = row_of_slot[slot]
            if row == NOWHERE:
                vacant[num_vacant] = slot
                num_vacant += 1
            elif counts[row]:
                warm[num_warm] = slot
                num_warm += 1
            else:
                slot_of_row[row] = NOWHERE
                row_of_slot[slot] = NOWHERE
                num_cold += 1
    return warm[:num_warm], vacant[:num_vacant], num_cold


@njit(nogil=True, cache=True)
def colder_slots(
    window: Any, newcomers: Any, counts: Any, row_of_slot: Any, last_use: Any, step: Any
) -> Any:
    """Slots that newcomers displace: the coldest of a window, each colder than its newcomer.

    Of equally cold ones those used longest ago. The step's own slots are spared.

    Args:
        window: distinct slots.
        newcomers: hotness of rows that want a slot, falling, uint8 [n].
        counts: hotness of every row, uint8 [rows].
        row_of_slot: NOWHERE where a slot is empty, int32 [slots].
        last_use: number of the last step that used each slot, int64 [slots].
        step: number of the running step.

    Returns:
        Slots for the first newcomers, int64 [at most n].
    """
    heats = np.empty(len(window), dtype=np.int16)
    left = np.zeros(_NUM_HEATS, dtype=np.int64)
    for i in range(len(window)):
        row = row_of_slot[window[i]]
        heats[i] = _SPARED
        if row != NOWHERE and last_use[window[i]] != step:
            heats[i] = counts[row]
            left[heats[i]] += 1
    # Newcomers fall and victims rise in hotness: the first that does not fit ends the exchange.
    number = heat = of_heat = 0
    while number < len(newcomers) and heat < newcomers[number]:
        if left[heat]:
            left[heat] -= 1
            number += 1
            of_heat += 1
        else:
            heat += 1
            of_heat = 0
    victims = np.empty(number, dtype=np.int64)
    taken = 0
    ties = np.empty(left[heat] + of_heat if number else 0, dtype=np.int64)
    num_ties = 0
    for i in range(len(window) if number else 0):
        if _SPARED < heats[i] < heat:
            victims[taken] = window[i]
            taken += 1
        elif heats[i] == heat:
            ties[num_ties] = window[i]
            num_ties += 1
    victims[taken:] = _used_longest_ago(ties, last_use, number - taken)
    return victims


@njit(nogil=True, cache=True)
def _used_longest_ago(slots: Any, last_use: Any, number: Any) -> Any:
    """So many of the slots, those used longest ago."""
    if number in (0, len(slots)):
        return slots[:number]
    uses = last_use[slots]
    latest = np.partition(uses, number - 1)[number - 1]
    found = np.empty(number, dtype=np.int64)
    num_found = 0
    num_latest = number
    for i in range(len(slots)):
        num_latest -= uses[i] < latest
    for i in range(len(slots)):
        if uses[i] < latest or (uses[i] == latest and num_latest > 0):
            num_latest -= uses[i] == latest
            found[num_found] = slots[i]
            num_found += 1
    return found


@njit(nogil=True, cache=True)
def find_absent(
    counts: Any, slot_of_row: Any, least: Any, first: Any, width: Any, limit: Any
) -> Any:
    """Absent rows at least so hot, up to `limit` of the `width` rows from `first` on, in a ring.

    Returns:
        The rows, int64 [n]; how many were looked at.
    """
    found = np.empty(limit, dtype=np.int64)
    number = seen = 0
    while seen < width and number < limit:
        row = (first + seen) % len(counts)
        if counts[row] >= least and slot_of_row[row] == NOWHERE:
            found[number] = row
            number += 1
        seen += 1
    return found[:number], seen

"""Streams of row lookups in steps: MovieLens-100K and synthetic ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.cache_yardsticks import Int64Array, Step, Stream
from helm_engine.datasets.ml100k import MovieLens100K
from helm_engine.datasets.synthetic import SyntheticConfig, SyntheticWorkload

STEP_LOOKUPS = 128
"""Rows that a step of a synthetic stream asks for, repeated ones among them."""
ML100K_LOOKUPS = 16
"""Fewer, or a step would look up more rows than the smallest cache has."""
VISIT_EVENTS = 10
HISTORY_EVENTS = 200
"""What the bundled model reads of a history."""

ZIPF_ROWS = 100_000
SCANNED_ROWS = 50_000
SCAN_EVERY, SCAN_LENGTH = 20_000, 5_000
CATALOGUE_ITEMS, CATALOGUE_CATEGORIES, CATALOGUE_USERS = 1 << 16, 128, 80


def in_steps(rows: Int64Array, num_rows: int, lookups: int) -> Stream:
    """Cuts single lookups (int64 [n]) into steps of so many."""
    return _stream(
        num_rows, (rows[first : first + lookups] for first in range(0, len(rows), lookups))
    )


def _stream(num_rows: int, batches: Iterable[Int64Array]) -> Stream:
    """Each batch is a step; its rows come in the order of their first appearance, as engines do."""
    steps = []
    for batch in batches:
        row_ids, first, times = np.unique(batch, return_index=True, return_counts=True)
        order = np.argsort(first)
        steps.append(Step(row_ids[order], times[order].astype(np.int64)))
    return Stream(num_rows, steps)


def ml100k_events(dataset: MovieLens100K) -> Stream:
    """Every event's item once, all users together in the order of time: what KV reuse leaves."""
    order = np.argsort(dataset.timestamps, kind="stable")
    return in_steps(dataset.item_ids[order], dataset.num_items + 1, ML100K_LOOKUPS)


def ml100k_histories(dataset: MovieLens100K) -> Stream:
    """A user asks after every ten events, and all of the history is looked up: no KV is reused."""
    visits = []
    for user in range(dataset.num_users):
        items, times = dataset.history(user)
        for length in range(VISIT_EVENTS, len(items) + 1, VISIT_EVENTS):
            visits.append((times[length - 1], items[max(0, length - HISTORY_EVENTS) : length]))
    visits.sort(key=lambda visit: int(visit[0]))
    return _stream(dataset.num_items + 1, (items for _, items in visits))


def zipf(exponent: float, num_lookups: int, seed: int) -> Stream:
    """Rows drawn by a Zipf law that never changes."""
    return in_steps(_zipf_rows(exponent, num_lookups, seed), ZIPF_ROWS, STEP_LOOKUPS)


def _zipf_rows(exponent: float, num_lookups: int, seed: int) -> Int64Array:
    """Ids below `ZIPF_ROWS`; which of them are popular is random: int64 [n]."""
    rng = np.random.default_rng(seed)
    bounds = np.cumsum(np.arange(1.0, ZIPF_ROWS + 1.0) ** -exponent)
    ranks = np.searchsorted(bounds, rng.random(num_lookups) * bounds[-1], side="right")
    rows: Int64Array = rng.permutation(ZIPF_ROWS)[ranks]
    return rows


def sudden_change(num_lookups: int, seed: int) -> Stream:
    """Zipf 1.0, and in the middle all rows swap their popularity."""
    rows = _zipf_rows(1.0, num_lookups, seed)
    half = num_lookups // 2
    rows[half:] = np.random.default_rng([seed, 1]).permutation(ZIPF_ROWS)[rows[half:]]
    return in_steps(rows, ZIPF_ROWS, STEP_LOOKUPS)


def scan(num_lookups: int, seed: int) -> Stream:
    """Zipf 1.0, and after every 20,000 lookups 5,000 rows of others in a row, round and round."""
    rows = _zipf_rows(1.0, num_lookups, seed)
    parts = []
    for number, first in enumerate(range(0, num_lookups, SCAN_EVERY)):
        scanned = (np.arange(SCAN_LENGTH) + number * SCAN_LENGTH) % SCANNED_ROWS
        parts += [rows[first : first + SCAN_EVERY], ZIPF_ROWS + scanned]
    return in_steps(np.concatenate(parts), ZIPF_ROWS + SCANNED_ROWS, STEP_LOOKUPS)


def drift(num_lookups: int, seed: int) -> Stream:
    """New events of DLRMv3's generator, Zipf 1.0 in a category: new items appear every day."""
    days = max(2, num_lookups // (CATALOGUE_USERS * 70))  # 0.7 visits of 100 events a day
    workload = SyntheticWorkload(
        SyntheticConfig(
            num_items=CATALOGUE_ITEMS,
            num_categories=CATALOGUE_CATEGORIES,
            item_zipf=1.0,
            num_users=CATALOGUE_USERS,
            num_train_steps=days,
            num_inference_steps=0,
            seed=seed,
        )
    )
    users = [workload.user(user) for user in range(CATALOGUE_USERS)]
    rows = [
        users[user].events.item_ids[
            users[user].history_length(day) : users[user].history_length(day + 1)
        ]
        for day in range(days)
        for user in workload.users_of(day).tolist()
    ]
    return in_steps(np.concatenate(rows), CATALOGUE_ITEMS, STEP_LOOKUPS)

"""Which rows deserve a slot: TinyLFU's admission and the ageing of its counts, case by case."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from block_manager.embedding_cache import EmbeddingCache
from block_manager.row_plan import NOWHERE, RowPlan

NUM_ROWS = 5000
HOT = {0, 1, 2, 3}


def make_cache(rows_per_page: int = 4, num_pages: int = 1) -> EmbeddingCache:
    return EmbeddingCache(np.arange(1, num_pages + 1), rows_per_page, NUM_ROWS)


def plan_rows(cache: EmbeddingCache, batch: dict[int, int]) -> RowPlan:
    rows = np.fromiter(batch.keys(), np.int64, len(batch))
    return cache.plan(rows, np.fromiter(batch.values(), np.int64, len(batch)))


def use(cache: EmbeddingCache, rows: Iterable[int], times: int = 1) -> None:
    cache.commit(plan_rows(cache, dict.fromkeys(rows, times)))
    cache.check_integrity()


def resident(cache: EmbeddingCache) -> set[int]:
    return set(np.flatnonzero(cache.lookup(np.arange(NUM_ROWS)) != NOWHERE).tolist())


def cache_of_hot_rows(times: int) -> EmbeddingCache:
    """One page of four slots that hold the four hot rows."""
    cache = make_cache()
    use(cache, HOT, times)
    return cache


def test_rows_are_admitted_while_slots_are_free() -> None:
    cache = make_cache()
    use(cache, [5, 6, 7])
    assert resident(cache) == {5, 6, 7}


def test_newcomer_seen_once_does_not_displace_a_hotter_row() -> None:
    cache = cache_of_hot_rows(times=2)
    use(cache, [9])
    assert resident(cache) == HOT


def test_newcomer_as_hot_as_the_coldest_row_does_not_displace_it() -> None:
    cache = cache_of_hot_rows(times=2)
    use(cache, [9], times=2)
    assert resident(cache) == HOT


def test_newcomer_asked_for_more_often_displaces_the_coldest_row() -> None:
    cache = make_cache()
    use(cache, [0, 1, 3], times=3)
    use(cache, [2])
    use(cache, [9])
    use(cache, [9])
    assert resident(cache) == {0, 1, 3, 9}


def test_of_equally_cold_rows_the_one_used_longest_ago_is_displaced() -> None:
    cache = cache_of_hot_rows(times=1)
    for row in (2, 0, 3, 1):
        use(cache, [row])
    use(cache, [9], times=3)
    assert resident(cache) == {0, 1, 3, 9}


def test_row_counts_as_used_when_it_is_admitted() -> None:
    cache = make_cache()
    for row in (1, 2, 3, 0):
        use(cache, [row])
    use(cache, [9], times=2)
    assert resident(cache) == {0, 2, 3, 9}


def test_row_of_the_running_step_is_not_displaced_by_a_hotter_one() -> None:
    cache = cache_of_hot_rows(times=1)
    cache.commit(plan_rows(cache, {0: 1, 1: 1, 2: 1, 3: 1, 9: 9}))
    assert resident(cache) == HOT
    cache.check_integrity()


def test_hot_set_of_the_past_gives_way_to_a_new_one() -> None:
    cache = cache_of_hot_rows(times=255)
    # Counts that never aged would ask for 255 accesses of each new row.
    for _ in range(500):
        use(cache, [4, 5, 6, 7])
    assert resident(cache) == {4, 5, 6, 7}


def test_long_scan_of_cold_rows_leaves_the_hot_set_resident() -> None:
    cache = cache_of_hot_rows(times=100)
    for first in range(4, 200, 4):
        use(cache, range(first, first + 4))
    assert resident(cache) == HOT


def test_cold_row_is_found_wherever_it_sits_in_a_large_pool() -> None:
    cache = make_cache(rows_per_page=1024, num_pages=4)
    hot = set(range(4096)) - {2500}
    use(cache, hot, times=8)
    use(cache, [2500])
    # Not every slot is looked at each time. The newcomer never gets hotter than the hot rows.
    for _ in range(4):
        use(cache, [4500], times=2)
    assert resident(cache) == hot | {4500}

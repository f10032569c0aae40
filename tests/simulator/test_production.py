"""The setting `production` reuses rows as often as the published traces say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helm_engine.simulator.events.law import Asked, Int64Array
from helm_engine.simulator.events.production import (
    LOOKUP_SHARES,
    ROW_SHARES,
    USES,
    USES_PER_ROW,
    ProductionLaw,
    fit_row_classes,
)
from helm_engine.simulator.scaling import sampled_rows
from helm_engine.simulator.trace import make_trace
from tests.simulator.small import regime, setting, workload

ITEMS = 4_000_000
"""The hottest classes have a few rows each then."""


def first_histories(law: ProductionLaw, lookups: int, people: int, drift: int = 0) -> Int64Array:
    """What people's first histories look up, so many items in all."""
    ones = np.ones(people, dtype=np.int64)
    lengths = np.full(people, lookups // people)
    asked = Asked(np.arange(people), lengths, 0 * ones, ones, ones, drift * ones)
    return law.draw(asked, np.random.default_rng(0), (1, 2)).first_histories


@pytest.fixture(scope="module")
def counts() -> Int64Array:
    """How often each row is met in as many lookups as a batch has for such a catalogue."""
    lookups = int(ITEMS * fit_row_classes().lookups_per_row)
    found = np.bincount(first_histories(ProductionLaw(ITEMS, [regime()]), lookups, 2400))
    return found[found > 0]


def test_lookups_and_rows_are_reused_as_published(counts: Int64Array) -> None:
    bins = np.searchsorted(USES, counts) - 1
    lookup_shares = np.bincount(bins, weights=counts, minlength=len(USES) - 1) / counts.sum()
    row_shares = np.bincount(bins, minlength=len(USES) - 1) / len(counts)
    np.testing.assert_allclose(lookup_shares, LOOKUP_SHARES, atol=0.005)
    np.testing.assert_allclose(row_shares, ROW_SHARES, atol=0.003)
    assert counts.mean() == pytest.approx(USES_PER_ROW, rel=0.005)


def test_the_hottest_rows_take_the_published_part_of_all_lookups(counts: Int64Array) -> None:
    """Points of the hit-rate curve of a cache that knows which rows are the hottest."""
    hits = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    rows = np.cumsum(ROW_SHARES[::-1])
    lookups = np.cumsum(LOOKUP_SHARES[::-1]) / sum(LOOKUP_SHARES)
    for rows_share, lookups_share in zip(rows, lookups, strict=True):
        if rows_share > 0.01:  # Three digits are published.
            found = hits[int(min(rows_share, 1.0) * len(counts)) - 1]
            assert found == pytest.approx(lookups_share, abs=0.01)


def test_draws_do_not_depend_on_each_other() -> None:
    law = ProductionLaw(1000, [regime()])
    items = first_histories(law, 100_000, 10)
    hottest = items == np.bincount(items).argmax()
    share = hottest.mean()
    assert (hottest[1:] & hottest[:-1]).mean() == pytest.approx(share**2, abs=0.01)


def test_with_drift_new_rows_come_in_at_the_top() -> None:
    law = ProductionLaw(200_000, [regime()])
    at_once = np.bincount(first_histories(law, 100_000, 10), minlength=200_000)
    late = np.bincount(first_histories(law, 100_000, 10, drift=300), minlength=200_000)
    np.testing.assert_array_equal(late, np.roll(at_once, -300))
    assert at_once[:100].sum() > 0.25 * at_once.sum()


def test_a_workload_runs_over_it() -> None:
    over: dict[str, Any] = dict(data="production", num_categories=None, categories_per_user=None)
    laws = workload(regime(item_zipf=None), **over)
    trace = make_trace(laws, 1)
    assert trace.setting == setting(**over)
    assert 0 <= trace.events.min() < trace.events.max() < 6000
    assert (np.bincount(trace.events)[:60].sum() / len(trace.events)) > 0.4
    same, other = make_trace(laws, 1), make_trace(laws, 2)
    np.testing.assert_array_equal(trace.events, same.events)
    assert len(other.events) != len(trace.events)


def test_a_sample_of_the_rows_has_its_part_of_the_lookups() -> None:
    """What `--scale` relies on, but for the hottest hundredth, which EMB always has."""
    sizes = setting(
        data="production", num_items=200_000, num_categories=None, categories_per_user=None
    )
    items = first_histories(ProductionLaw(sizes.num_items, [regime()]), 1_000_000, 10)
    for scale in (4, 16):
        numbers, number = sampled_rows(sizes, scale)
        assert number == pytest.approx(sizes.num_items / scale, rel=0.01)
        others = items[items > sizes.num_items // 100]
        assert (numbers[others] >= 0).mean() == pytest.approx(1 / scale, rel=0.03)

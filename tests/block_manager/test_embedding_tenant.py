"""Width classes that compete for the pages of one tenant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_manager.embedding_cache import EmbeddingCache
from block_manager.embedding_tenant import EmbeddingTenant, WidthClass
from block_manager.exceptions import IntegrityError

NUM_PAGES = 24
WIDE, NARROW = 0, 1
"""2 rows of the wide class fit a page, 8 of the narrow one."""
ROWS_PER_PAGE = (2, 8)
NUM_ROWS = (60, 240)


def make_tenant(
    wide_pages: int, narrow_pages: int, miss_ms: tuple[float, float] = (1.0, 1.0)
) -> EmbeddingTenant:
    pages = np.arange(1, NUM_PAGES + 1)
    shares = pages[:wide_pages], pages[wide_pages : wide_pages + narrow_pages]
    return EmbeddingTenant(
        [
            WidthClass(EmbeddingCache(share, per_page, rows, NUM_PAGES + 1), cost)
            for share, per_page, rows, cost in zip(
                shares, ROWS_PER_PAGE, NUM_ROWS, miss_ms, strict=True
            )
        ]
    )


def use(tenant: EmbeddingTenant, width_class: int, rows: list[int]) -> float:
    """A step that asks for rows of a class; the share that was resident."""
    cache = tenant.classes[width_class].cache
    row_ids = np.array(rows)
    plan = cache.plan(row_ids, np.ones(len(rows), dtype=np.int64))
    cache.commit(plan)
    return float(plan.resident.mean())


def pages_of(tenant: EmbeddingTenant) -> tuple[int, int]:
    return tuple(one.cache.num_pages for one in tenant.classes)  # type: ignore[return-value]


def run(tenant: EmbeddingTenant, hot: dict[int, int], steps: int) -> dict[int, float]:
    """Steps over the first so many rows of each class, with a page free to wander after each."""
    hits = {}
    for _ in range(steps):
        for width_class, number in hot.items():
            hits[width_class] = use(tenant, width_class, [*range(number)])
        tenant.observe_step()
        tenant.rebalance(limit=1)
        tenant.check_integrity()
    return hits


def test_a_starved_class_that_becomes_hot_gets_its_pages_back() -> None:
    tenant = make_tenant(12, 12)
    hits = run(tenant, {NARROW: 190}, steps=400)
    assert pages_of(tenant)[WIDE] <= 1, "what nobody asks for has no pages"
    assert hits[NARROW] > 0.9
    hits = run(tenant, {WIDE: 24, NARROW: 40}, steps=1500)
    assert hits == {WIDE: 1.0, NARROW: 1.0}, "12 pages and 5 pages hold all of it"


def test_pages_wander_to_the_rows_that_cost_more_to_load() -> None:
    # Both classes are asked for 48 rows a step; those of a wide page save less each.
    cheap, dear = make_tenant(12, 2), make_tenant(12, 2, miss_ms=(100.0, 1.0))
    for tenant in (cheap, dear):
        run(tenant, {WIDE: 48, NARROW: 48}, steps=400)
    assert pages_of(cheap)[NARROW] == 6, "all 48 narrow rows fit in 6 pages"
    assert pages_of(dear)[WIDE] == 14, "a wide row saves more than four narrow ones"


def test_growth_goes_where_a_page_saves_most_and_shrinking_takes_where_it_saves_least() -> None:
    tenant = make_tenant(4, 4)
    for _ in range(50):
        use(tenant, WIDE, [*range(40)])
        use(tenant, NARROW, [*range(8)])
        tenant.observe_step()
    tenant.grow(np.arange(9, 17))
    assert pages_of(tenant) == (12, 4)
    pages, _ = tenant.shrink(3)
    assert len(pages) == 3
    assert pages_of(tenant) == (12, 1)
    tenant.check_integrity()


def test_pages_of_a_tenant_without_demand_go_where_least_is_covered() -> None:
    tenant = make_tenant(0, 0)
    tenant.grow(np.arange(1, 17))
    wide, narrow = pages_of(tenant)
    assert wide + narrow == 16
    assert min(wide, narrow) >= 4
    tenant.check_integrity()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["use", "grow", "shrink", "rebalance"]),
            st.integers(0, 1),
            st.integers(1, 12),
        ),
        max_size=40,
    )
)
def test_no_page_is_lost_or_shared(operations: list[tuple[str, int, int]]) -> None:
    tenant = make_tenant(6, 6)
    outside = set(range(13, NUM_PAGES + 1))
    for operation, width_class, number in operations:
        if operation == "use":
            use(tenant, width_class, [*range(number * 3)])
            tenant.observe_step()
        elif operation == "grow":
            coming = [outside.pop() for _ in range(min(number, len(outside)))]
            tenant.grow(np.array(coming, dtype=np.int64))
        elif operation == "shrink":
            leaving, _ = tenant.shrink(number)
            outside |= set(leaving.tolist())
        else:
            tenant.rebalance(number)
        tenant.check_integrity()
        assert set(tenant.page_ids().tolist()) | outside == set(range(1, NUM_PAGES + 1))
        assert tenant.num_pages + len(outside) == NUM_PAGES


def test_self_check_finds_a_page_of_two_classes() -> None:
    tenant = make_tenant(4, 4)
    tenant.classes[NARROW].cache.grow(np.array([1]))
    with pytest.raises(IntegrityError, match="page 1 belongs to two"):
        tenant.check_integrity()


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^miss_ms: must be at least 0, not -1"):
        make_tenant(1, 1, miss_ms=(-1.0, 1.0))


def test_a_tenant_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^classes: must not be empty"):
        EmbeddingTenant([])

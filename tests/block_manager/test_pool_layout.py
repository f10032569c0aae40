"""How one allocation is cut: hand-worked sizes, the floors, and the smallest pool that works."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from block_manager.pool_layout import PoolConfig, PoolLayout, PoolTooSmallError, plan_layout


def layout_of(
    pool_bytes: int,
    emb_fraction: float = 0.5,
    *,
    block_tokens: int = 4,
    kv_bytes_per_token: int = 100,
    row_bytes: int = 48,
    max_context_tokens: int = 10,
    staging_rows: int = 5,
) -> PoolLayout:
    """By default: pages of 512 bytes (400 used), 10 rows each, 240 bytes of staging."""
    return plan_layout(
        PoolConfig(pool_bytes, emb_fraction, block_tokens),
        kv_bytes_per_token=kv_bytes_per_token,
        row_bytes=row_bytes,
        max_context_tokens=max_context_tokens,
        staging_rows=staging_rows,
    )


# ---------------------------------------------------------------- hand-worked sizes


def test_page_holds_one_block_rounded_up_to_256_bytes() -> None:
    assert layout_of(10_000).page_bytes == 512


def test_block_that_fills_its_page_is_not_rounded_further() -> None:
    assert layout_of(10_000, kv_bytes_per_token=128).page_bytes == 512


def test_row_wider_than_a_block_decides_the_page() -> None:
    layout = layout_of(100_000, row_bytes=2000)
    assert (layout.page_bytes, layout.rows_per_page) == (2048, 1)


def test_page_holds_as_many_rows_as_fit_and_leaves_a_tail() -> None:
    layout = layout_of(10_000)
    assert (layout.rows_per_page, layout.page_tail_bytes) == (10, 32)


def test_pages_take_what_staging_leaves() -> None:
    layout = layout_of(10_000)
    assert layout.staging_bytes == 240
    assert layout.num_pages == 19  # (10,000 - 240) / 512 = 19.06


def test_total_is_pages_and_staging() -> None:
    assert layout_of(10_000).total_bytes == 19 * 512 + 240


def test_emb_gets_its_share_of_whole_pages() -> None:
    layout = layout_of(10_000)
    assert (layout.num_emb_pages, layout.num_kv_pages) == (9, 10)


def test_emb_fraction_zero_gives_emb_no_page() -> None:
    layout = layout_of(10_000, 0.0)
    assert (layout.num_emb_pages, layout.num_kv_pages) == (0, 19)


def test_emb_fraction_one_leaves_kv_the_null_block_and_one_longest_history() -> None:
    layout = layout_of(10_000, 1.0)
    assert (layout.num_emb_pages, layout.num_kv_pages) == (15, 4)


# ---------------------------------------------------------------- too small

NEEDED = 4 * 512 + 240  # the null block, three blocks of a history of ten, staging


def test_pool_of_exactly_the_bytes_needed_works() -> None:
    assert layout_of(NEEDED).num_pages == 4


def test_pool_one_byte_too_small_is_refused_with_the_bytes_needed() -> None:
    with pytest.raises(PoolTooSmallError, match=rf"pool_bytes: {NEEDED - 1} .* {NEEDED} "):
        layout_of(NEEDED - 1)


@settings(deadline=None)
@given(
    block_tokens=st.integers(1, 40),
    kv_bytes_per_token=st.integers(1, 3000),
    row_bytes=st.integers(1, 3000),
    max_context_tokens=st.integers(1, 500),
    staging_rows=st.integers(0, 500),
)
def test_bytes_that_the_refusal_names_are_enough_and_one_less_is_not(**sizes: int) -> None:
    with pytest.raises(PoolTooSmallError) as refusal:
        layout_of(1, **sizes)
    named = re.search(r"at least (\d+) ", str(refusal.value))
    assert named is not None
    needed = int(named[1])
    assert layout_of(needed, **sizes).total_bytes == needed
    with pytest.raises(PoolTooSmallError):
        layout_of(needed - 1, **sizes)


@settings(deadline=None)
@given(
    pool_bytes=st.integers(1, 200_000),
    emb_fraction=st.floats(0.0, 1.0),
    block_tokens=st.integers(1, 16),
    kv_bytes_per_token=st.integers(1, 300),
    row_bytes=st.integers(1, 600),
    max_context_tokens=st.integers(1, 50),
    staging_rows=st.integers(0, 50),
)
def test_any_layout_fits_the_pool_and_keeps_the_floor(
    pool_bytes: int, emb_fraction: float, **sizes: int
) -> None:
    try:
        layout = layout_of(pool_bytes, emb_fraction, **sizes)
    except PoolTooSmallError:
        assume(False)
    assert pool_bytes - layout.page_bytes < layout.total_bytes <= pool_bytes
    assert layout.page_bytes >= sizes["block_tokens"] * sizes["kv_bytes_per_token"]
    assert layout.page_bytes % 256 == 0
    assert 0 <= layout.page_tail_bytes < layout.row_bytes
    assert layout.num_emb_pages <= emb_fraction * layout.num_pages
    # Apart from the null block, KV has room for a longest history.
    assert (layout.num_kv_pages - 1) * layout.block_tokens >= sizes["max_context_tokens"]


# ---------------------------------------------------------------- an operator's mistakes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pool_bytes", 0),
        ("pool_bytes", -1),
        ("emb_fraction", -0.01),
        ("emb_fraction", 1.01),
        ("emb_fraction", float("nan")),
        ("block_tokens", 0),
        ("block_tokens", -4),
    ],
)
def test_value_outside_its_limits_is_refused_by_name(field: str, value: float) -> None:
    good: dict[str, Any] = {"pool_bytes": 10_000, "emb_fraction": 0.5, "block_tokens": 4}
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        PoolConfig(**good | {field: value})

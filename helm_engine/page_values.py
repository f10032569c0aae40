"""What watches the worth of pages in an engine whose device's costs are known."""

from __future__ import annotations

from block_manager.page_value import PageValueEstimator, SamplingConfig
from block_manager.pool_layout import PoolLayout
from block_manager.reuse_distance import PageCosts
from model_executor.cost_profile import CostProfile


def page_value_estimator(
    profile: CostProfile, layout: PoolLayout, num_rows: int
) -> PageValueEstimator:
    """The estimator of an engine's pool over tables of so many rows."""
    return PageValueEstimator(
        layout.num_pages,
        layout.rows_per_page,
        layout.block_tokens,
        num_rows,
        PageCosts(profile.prefill_row_ms, profile.attention_pair_ms, profile.row_miss_ms),
        SamplingConfig(),
    )

"""The boundary by hand: what is asked for, what is reached, and what is waited for."""

from __future__ import annotations

import re

import numpy as np
import pytest

from block_manager.block_pool import BlockPool
from block_manager.boundary import Boundary, default_pages_per_step
from block_manager.embedding_cache import EmbeddingCache
from block_manager.embedding_tenant import EmbeddingTenant, WidthClass
from block_manager.page_pool import PagePool, Tenant
from block_manager.pool_layout import PoolConfig, PoolLayout, plan_layout

ROWS_PER_PAGE = 4
NUM_PAGES = 20
MIN_KV_PAGES = 4
"""The null block and three blocks of a history of twelve."""


def make_layout(emb_fraction: float) -> PoolLayout:
    return plan_layout(
        PoolConfig(NUM_PAGES * 512, emb_fraction, block_tokens=4),
        kv_bytes_per_token=128,
        row_bytes=128,
        max_context_tokens=12,
        staging_rows=0,
    )


class Pool:
    """Both tenants of 20 pages; 2 may move between two steps."""

    def __init__(self, emb_fraction: float, max_pages_per_step: int | None = 2) -> None:
        layout = make_layout(emb_fraction)
        self.pages = PagePool(layout)
        self.kv = BlockPool(self.pages.pages_of(Tenant.KV), layout.num_pages)
        self.emb = EmbeddingCache(
            self.pages.pages_of(Tenant.EMB), ROWS_PER_PAGE, 200, layout.num_pages
        )
        tenant = EmbeddingTenant([WidthClass(self.emb, miss_ms=1.0)])
        self.boundary = Boundary(self.pages, self.kv, tenant, layout, max_pages_per_step)

    def step(self) -> int:
        """Pages that move."""
        move = self.boundary.step()
        self.pages.check_integrity(self.kv, self.emb)
        return len(move)

    def load(self, rows: range, times: int = 1) -> None:
        ids = np.array(rows)
        self.emb.commit(self.emb.plan(ids, np.full(len(ids), times)))


def test_a_boundary_that_nobody_moved_is_where_it_was_put() -> None:
    pool = Pool(0.25)
    assert (pool.boundary.target, pool.boundary.committed, pool.boundary.lag_pages) == (
        0.25,
    ) * 2 + (0,)
    assert pool.step() == 0


@pytest.mark.parametrize(("begins", "ends"), [(0.25, 0.6), (0.6, 0.25), (0.0, 0.8), (0.8, 0.0)])
def test_committed_follows_the_target_in_steps_that_are_bounded(begins: float, ends: float) -> None:
    pool = Pool(begins)
    assert pool.boundary.set_target(ends) == ends
    wanted = round(abs(ends - begins) * NUM_PAGES)
    assert abs(pool.boundary.lag_pages) == wanted
    moved = [pool.step() for _ in range(wanted)]
    assert moved == [2] * (wanted // 2) + [1] * (wanted % 2) + [0] * (wanted - -(-wanted // 2))
    assert (pool.boundary.committed, pool.boundary.lag_pages) == (ends, 0)
    assert pool.boundary.num_moved_pages == wanted


def test_kv_keeps_the_blocks_of_one_longest_history() -> None:
    pool = Pool(0.5)
    assert pool.boundary.set_target(1.0) == 1 - MIN_KV_PAGES / NUM_PAGES
    while pool.step():
        pass
    assert pool.kv.num_pages == MIN_KV_PAGES
    assert pool.boundary.lag_pages == 0
    assert pool.boundary.target == 1.0


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused_and_nothing_changes(share: float) -> None:
    pool = Pool(0.25)
    message = f"emb_fraction: must be within 0..1, not {share}"
    with pytest.raises(ValueError, match=re.escape(message)):
        pool.boundary.set_target(share)
    assert pool.boundary.target == 0.25


def test_a_pace_below_one_page_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_pages_per_step: must be at least 1, not 0"):
        Pool(0.25, max_pages_per_step=0)


def test_the_pace_is_a_64th_of_the_pool_by_default() -> None:
    assert [default_pages_per_step(pages) for pages in (1, 64, 65, 6400)] == [1, 1, 2, 100]


def test_blocks_that_requests_hold_are_waited_for() -> None:
    pool = Pool(0.25)
    held = pool.kv.get_new_blocks(pool.kv.num_free_blocks)
    pool.boundary.set_target(0.5)
    assert [pool.step(), pool.boundary.lag_pages] == [0, 5]
    pool.kv.free_blocks(held[:3])
    assert [pool.step(), pool.step(), pool.boundary.lag_pages] == [2, 1, 2]
    pool.kv.free_blocks(held[3:])
    assert [pool.step(), pool.boundary.lag_pages] == [2, 0]
    assert pool.boundary.committed == 0.5


def test_pages_with_slots_of_a_refill_are_waited_for() -> None:
    pool = Pool(0.0)
    pool.load(range(100, 104))  # Hot and absent: there are no pages.
    pool.boundary.set_target(0.1)
    assert pool.step() == 2
    refill = pool.emb.plan_refill(4)
    assert refill is not None
    pool.boundary.set_target(0.0)
    assert [pool.step(), pool.step(), pool.boundary.lag_pages] == [1, 0, -1]
    pool.emb.commit_refill(refill)
    assert [pool.step(), pool.boundary.lag_pages] == [1, 0]


def test_hot_rows_of_a_page_that_leaves_displace_colder_ones() -> None:
    pool = Pool(0.2)  # Four pages of four rows.
    pool.load(range(16))
    hot = [0, 5, 10, 15]  # One on each page.
    pool.load(range(0, 16, 5), times=9)
    pool.boundary.set_target(0.05)
    pool.step()
    pool.step()
    assert pool.emb.num_pages == 1
    assert (pool.emb.lookup(np.array(hot)) >= 0).all()
    assert pool.boundary.num_moved_rows >= 3


def test_the_coldest_history_gives_its_tail_first() -> None:
    pool = Pool(0.0)
    old, new = pool.kv.get_new_blocks(4), pool.kv.get_new_blocks(4)
    for number, blocks in enumerate((old, new)):
        hashes = [bytes([number, place]) + bytes(30) for place in range(4)]
        pool.kv.cache_blocks(blocks, hashes)  # type: ignore[arg-type]
        pool.kv.free_blocks(blocks[::-1])
    # 11 blocks were never used and go first; then the tail of the history that is longest unused.
    pool.boundary.set_target(13 / NUM_PAGES)
    while pool.step():
        pass
    assert pool.kv.ref_cnt[old].tolist() == [0, 0, -1, -1]
    assert pool.kv.ref_cnt[new].tolist() == [0, 0, 0, 0]

"""Rows of several widths and dtypes in one allocation, while pages change hands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from block_manager.block_pool import BlockPool
from block_manager.boundary import Boundary
from block_manager.embedding_cache import EmbeddingCache
from block_manager.embedding_tenant import EmbeddingTenant, WidthClass
from block_manager.page_pool import PagePool, Tenant
from block_manager.pool_layout import PoolConfig, PoolLayout, plan_layout
from model_executor.row_pages import RowPages

WIDTHS = (24, 9)
DTYPES = (torch.float32, torch.float16)
TABLE_ROWS = (300, 900)


def make_layout() -> PoolLayout:
    """40 pages of 512 bytes, half of them EMB's: 5 wide rows or 28 narrow ones each."""
    return plan_layout(
        PoolConfig(40 * 512, emb_fraction=0.5, block_tokens=4),
        kv_bytes_per_token=128,
        row_bytes=96,
        max_context_tokens=8,
        staging_rows=0,
    )


class SharedPages:
    """KV and two width classes in one allocation, with the rows that should be in it."""

    def __init__(self) -> None:
        layout = make_layout()
        self.storage = torch.full((layout.num_pages * layout.page_bytes // 4,), torch.nan)
        self.pages = [
            RowPages(self.storage, layout.num_pages, layout.page_bytes, width, dtype)
            for width, dtype in zip(WIDTHS, DTYPES, strict=True)
        ]
        self.pool = PagePool(layout)
        self.kv = BlockPool(self.pool.pages_of(Tenant.KV), layout.num_pages)
        shares = np.array_split(self.pool.pages_of(Tenant.EMB), len(WIDTHS))
        caches = [
            EmbeddingCache(share, pages.rows_per_page, rows, layout.num_pages)
            for share, pages, rows in zip(shares, self.pages, TABLE_ROWS, strict=True)
        ]
        self.tenant = EmbeddingTenant([WidthClass(cache, miss_ms=1.0) for cache in caches])
        self.boundary = Boundary(self.pool, self.kv, self.tenant, layout, max_pages_per_step=3)
        generator = torch.Generator().manual_seed(3)
        self.tables = [
            torch.randn((rows, width), generator=generator).to(dtype)
            for rows, width, dtype in zip(TABLE_ROWS, WIDTHS, DTYPES, strict=True)
        ]

    def move(self) -> None:
        """Moves pages and rows; what KV holds of pages is overwritten at once."""
        for width_class, rows in self.boundary.step().rows:
            sources, destinations = torch.from_numpy(rows.sources), rows.destinations
            self.pages[width_class].move(sources, torch.from_numpy(destinations))
        kv_pages = torch.from_numpy(self.kv.page_ids())
        self.storage.view(-1, 128).index_fill_(0, kv_pages, torch.nan)
        self.pool.check_integrity(self.kv, self.tenant)

    def use(self, width_class: int, row_ids: np.ndarray) -> None:
        """Loads what a step misses, and compares all that it finds in the pool."""
        cache, pages = self.tenant.classes[width_class].cache, self.pages[width_class]
        plan = cache.plan(row_ids, np.ones(len(row_ids), dtype=np.int64))
        loaded = plan.admitted
        table = self.tables[width_class]
        pages.write(torch.from_numpy(plan.slots[loaded]), table[torch.from_numpy(row_ids[loaded])])
        cache.commit(plan)
        slots = cache.lookup(row_ids)
        resident = slots >= 0
        found = pages.read(torch.from_numpy(slots[resident]))
        assert torch.equal(found, table[torch.from_numpy(row_ids[resident])])
        self.tenant.observe_step()


def test_rows_of_two_widths_survive_every_move() -> None:
    shared = SharedPages()
    assert [pages.rows_per_page for pages in shared.pages] == [5, 28]
    numbers = np.random.default_rng(1)
    for step in range(600):
        if step % 25 == 0:
            shared.boundary.set_target(float(numbers.uniform(0.0, 1.0)))
        for width_class, rows in enumerate(TABLE_ROWS):
            ranks = np.minimum(numbers.zipf(1.3, size=30), rows) - 1
            shared.use(width_class, np.unique(ranks))
        shared.move()
    assert shared.boundary.num_moved_pages > 100
    assert shared.boundary.num_moved_rows > 100


def test_a_row_wider_than_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^row_elements: 200 .* do not fit 512 bytes"):
        RowPages(torch.empty(1024), 8, 512, 200, torch.float32)

"""A pytest plugin that runs vLLM's tests on the block pool that COMPAT_POOL names.

"pass-through": a subclass of vLLM's own pool that changes nothing. "ours": `VllmBlockPool`, all
pages its own. "ours-with-emb": the same beside an EMB tenant that holds the pages behind. After
each test the books of all pools that it made must add up; outcomes go to the file COMPAT_REPORT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm.v1.core.block_pool as vllm_block_pool
from vllm_types import VLLM_TYPES

from block_manager.block_pool import BlockPool
from block_manager.embedding_cache import EmbeddingCache
from block_manager.group_keys import GROUP_KEYS
from block_manager.page_pool import PagePool, Tenant
from block_manager.pool_layout import PoolLayout
from block_manager.vllm_block_pool import VllmBlockPool

EMB_PAGES = 7
ROWS_PER_PAGE = 4
NUM_ROWS = 100

unchecked: list[Ours] = []
"""Pools that the running test made."""
num_made = 0


class Ours(VllmBlockPool):
    """Our pool with vLLM's classes, counted and checked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global num_made
        super().__init__(*args, types=VLLM_TYPES, **kwargs)
        num_made += 1
        unchecked.append(self)

    def check(self) -> None:
        """Raises `IntegrityError` where the books contradict each other."""
        self.books.check_integrity()


class OursWithEmb(Ours):
    """The same, in a pool of pages of which an EMB tenant without rows holds the last ones."""

    def __init__(
        self, num_gpu_blocks: int, enable_caching: bool, *args: Any, **kwargs: Any
    ) -> None:
        layout = PoolLayout(
            page_bytes=256,
            num_pages=num_gpu_blocks + EMB_PAGES,
            num_emb_pages=EMB_PAGES,
            min_kv_pages=num_gpu_blocks,
            block_tokens=1,
            row_bytes=64,
            rows_per_page=ROWS_PER_PAGE,
            staging_rows=0,
        )
        self.pages = PagePool(layout)
        self.emb = EmbeddingCache(
            self.pages.pages_of(Tenant.EMB), ROWS_PER_PAGE, NUM_ROWS, layout.num_pages
        )
        books = BlockPool(
            self.pages.pages_of(Tenant.KV),
            layout.num_pages,
            key_format=GROUP_KEYS,
            enable_caching=enable_caching,
        )
        super().__init__(num_gpu_blocks, enable_caching, *args, books=books, **kwargs)

    def check(self) -> None:
        """Raises `IntegrityError` where a tenant's books or the owners of pages do not add up."""
        self.pages.check_integrity(self.books, self.emb)
        assert len(self.emb.page_ids()) == EMB_PAGES


class PassThrough(vllm_block_pool.BlockPool):  # type: ignore[misc]
    """vLLM's own pool, put in place in the same way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global num_made
        super().__init__(*args, **kwargs)
        num_made += 1


POOLS = {"pass-through": PassThrough, "ours": Ours, "ours-with-emb": OursWithEmb}
under_test = POOLS[os.environ["COMPAT_POOL"]]
# Before the tests and the modules that they test import the name.
vllm_block_pool.BlockPool = under_test

outcomes: dict[str, str] = {}


@pytest.fixture(autouse=True)
def books_add_up() -> Iterator[None]:
    """Checks all pools that a test made, when it is over."""
    yield
    try:
        for pool in unchecked:
            pool.check()
    finally:
        unchecked.clear()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The modules that build pools must build ours."""
    from vllm.v1.core import kv_cache_coordinator, single_type_kv_cache_manager
    from vllm.v1.hisparse import block_pool as hisparse_block_pool

    for module in (kv_cache_coordinator, single_type_kv_cache_manager):
        assert module.BlockPool is under_test, f"{module.__name__} builds another pool"
    assert issubclass(hisparse_block_pool.SharedEventQueueBlockPool, under_test)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how each test ended; a failure at any stage outweighs a pass."""
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the outcomes, and that pools of the class under test were made."""
    result = {"pool": under_test.__name__, "pools_made": num_made, "outcomes": outcomes}
    Path(os.environ["COMPAT_REPORT"]).write_text(json.dumps(result), encoding="utf-8")

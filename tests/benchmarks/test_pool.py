"""What the pool's benchmark times is what it says, and it runs where the server's packages lack."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import pool as benchmark
from benchmarks import vllm_blocks
from benchmarks.pool import LAYOUT, Pool, bytes_held, make_evictable, measure_moves
from block_manager.free_slots import FreeSlots
from block_manager.page_pool import Tenant
from tests.e2e.running_server import REPOSITORY


@pytest.fixture(scope="module")
def evictable() -> Pool:
    pool = Pool(seed=1)
    make_evictable(pool)
    return pool


def test_every_page_is_full_of_what_can_be_evicted(evictable: Pool) -> None:
    assert evictable.emb.num_resident == LAYOUT.num_emb_pages * LAYOUT.rows_per_page
    resident = np.flatnonzero(evictable.emb.slot_of_row >= 0)
    assert np.count_nonzero(evictable.emb.policy.hotness(resident)) <= 1
    assert evictable.kv.num_cached_blocks == evictable.kv.num_free_blocks
    assert evictable.kv.num_free_blocks == LAYOUT.num_kv_pages - 1


def test_pages_go_to_kv_and_come_back_by_eviction_alone(evictable: Pool) -> None:
    evictions = evictable.emb.num_evictions
    pages = len(measure_moves(evictable, Tenant.KV)) * evictable.boundary.max_pages_per_step
    assert evictable.pages.num_emb_pages == LAYOUT.num_emb_pages - pages
    # The one row that was used last is warm.
    assert evictable.boundary.num_moved_rows <= 1
    assert evictable.emb.num_evictions - evictions == pytest.approx(96 * pages, abs=1)
    measure_moves(evictable, Tenant.EMB)
    assert evictable.pages.num_emb_pages == LAYOUT.num_emb_pages
    evictable.check_integrity()


def test_bytes_are_those_of_all_arrays_wherever_they_are_kept() -> None:
    class Owner:
        def __init__(self) -> None:
            self.number, self.table = 3, np.zeros(5, dtype=np.int32)
            self.same = self.table[:3]
            self.free = FreeSlots(2, rows_per_page=5)

    # A slot in the stack and its place, int32 both, and a page; what is shared counts once.
    assert bytes_held(Owner()) == 5 * 4 + 10 * (4 + 4) + 2 * 4


def test_without_vllm_the_ratio_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_blocks, "has_vllm", lambda: False)
    found = benchmark.alloc_vs_vllm()
    assert found == {"alloc_vs_vllm_ratio": None, "alloc_vs_vllm_reason": "vllm is not installed"}


def test_it_loads_no_package_of_the_server() -> None:
    heavy = {"fastapi", "uvicorn", "pydantic", "httpx", "rich", "helm_engine.config"}
    program = f"import sys, benchmarks.pool; sys.exit(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (1, "[]")

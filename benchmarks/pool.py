"""What the pool's books cost: lookup, admission, pages changing hands, and bytes, in microseconds.

The pool is that of `dlrmv3-mini`: a page holds 16 tokens of KV in 49,152 bytes or 96 rows of 512
bytes; 20,000 pages and a table of a million rows. Only bookkeeping is timed, in time of one thread;
what it stands for, copying and loading, is the device's. Figures are medians over repeats, and
`_spread` has their quartiles.

- `lookup_10k_us`: `EmbeddingCache.lookup` of 10,000 distinct rows at random, 96 % of them resident;
  `plan_10k_us` is a whole step of as many resident rows, counted, planned and committed.
- `admit_evict_1k_us`: a step of 1,000 absent rows that displace as many, planned and committed.
- `page_moves`: `Boundary.step`, by default a 64th of the pool between two steps, per page and way,
  to EMB and to KV. `empty`: pages without content. `evictable`: to EMB, KV blocks with hashes that
  nobody reads; to KV, pages of 96 rows that have cooled off. `scattered`: to KV, pages of which
  every second row is hot, so that these move to slots of others elsewhere.
- `page_move_us`: the mean of both ways where content is evictable: what a page costs each time it
  changes hands. `compaction_us_per_row`: what a row that moves to another slot adds.
- `bytes_per_row`: of the table's index and counts; `bytes_per_slot`: of every place for a row;
  `bytes_per_block`: of a KV block's books. All are host memory, taken with the pool.
- `alloc_vs_vllm_ratio`: see `vllm_blocks.py`; null where vLLM is not installed.

    python benchmarks/pool.py --json benchmarks/results/pool.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import numpy.typing as npt

from benchmarks import vllm_blocks
from benchmarks.report import benchmark_parser, write_result
from block_manager.block_hash import BLOCK_HASH_BYTES, BlockHash
from block_manager.block_pool import BlockPool
from block_manager.boundary import Boundary
from block_manager.embedding_cache import EmbeddingCache
from block_manager.embedding_tenant import EmbeddingTenant, WidthClass
from block_manager.page_pool import PagePool, Tenant
from block_manager.pool_layout import PoolLayout

LAYOUT = PoolLayout(
    page_bytes=49_152,
    num_pages=20_000,
    num_emb_pages=10_000,
    min_kv_pages=1,
    block_tokens=16,
    row_bytes=512,
    rows_per_page=96,
    staging_rows=0,
)
NUM_ROWS = 1_000_000
LOOKUP_ROWS, ADMITTED_ROWS = 10_000, 1_000
REPEATS, QUICK_REPEATS = 200, 20
ROUNDS, QUICK_ROUNDS = 12, 2
MOVES_PER_ROUND = 8
"""Moves one way, then as many back: a quarter of EMB's pages."""
WARM, HOT = 2, 200
"""Uses of a row; the step that brings so many halves them."""
COOLING_STEPS = 8
"""Counts are bytes: after so many halvings no row is hot."""

Int64Array = npt.NDArray[np.int64]
Microseconds = list[float]


class Pool:
    """Both tenants with half of the pages each, and every slot of EMB with a row."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pages = PagePool(LAYOUT)
        self.kv = BlockPool(self.pages.pages_of(Tenant.KV), LAYOUT.num_pages)
        self.emb = EmbeddingCache(
            self.pages.pages_of(Tenant.EMB), LAYOUT.rows_per_page, NUM_ROWS, LAYOUT.num_pages
        )
        tenant = EmbeddingTenant([WidthClass(self.emb, miss_ms=0.01)])
        self.tenant = tenant
        self.boundary = Boundary(self.pages, self.kv, tenant, LAYOUT)

    def step(self, row_ids: Int64Array, times: Int64Array) -> None:
        """A step of distinct rows, each used so often: planned, loaded at once and committed."""
        self.emb.commit(self.emb.plan(row_ids, times))

    def rows(self, resident: bool, number: int) -> Int64Array:
        """Rows at random, distinct, resident ones or absent ones."""
        row_ids = np.flatnonzero((self.emb.slot_of_row >= 0) == resident)
        return self.rng.choice(row_ids, min(number, len(row_ids)), replace=False)

    def fill_slots(self) -> None:
        """A row in every slot, every second one hot."""
        newcomers = self.rows(resident=False, number=self.emb.num_free_slots)
        self.step(newcomers, np.ones_like(newcomers))
        row_ids = np.flatnonzero(self.emb.slot_of_row >= 0)
        self.step(row_ids, self.rng.choice([WARM, HOT], len(row_ids)))
        self.step(self.rows(resident=True, number=1), np.ones(1, dtype=np.int64))

    def cool_off(self) -> None:
        """Steps of one row pass until all others are as cold as can be."""
        for _ in range(COOLING_STEPS):
            self.step(np.zeros(1, dtype=np.int64), np.array([10 * self.emb.num_slots]))

    def hash_free_blocks(self) -> None:
        """Every free block of KV has content that can be reused and that nobody reads."""
        block_ids = self.rng.permutation(self.kv.get_new_blocks(self.kv.num_free_blocks))
        self.kv.evict_blocks(block_ids)
        words = self.rng.bytes(BLOCK_HASH_BYTES * len(block_ids))
        edges = range(0, len(words), BLOCK_HASH_BYTES)
        self.kv.cache_blocks(
            block_ids, [BlockHash(words[edge : edge + BLOCK_HASH_BYTES]) for edge in edges]
        )
        self.kv.free_blocks(block_ids)

    def check_integrity(self) -> None:
        """Both tenants' books and the pool's."""
        self.pages.check_integrity(self.kv, self.tenant)


def timed(call: Callable[[], Any]) -> float:
    """Microseconds of this thread."""
    started = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - started) / 1e3


def measure_lookup(pool: Pool, repeats: int) -> tuple[Microseconds, Microseconds]:
    """Lookups of rows at random, and steps of resident ones."""
    lookups, steps = [], []
    once = np.ones(LOOKUP_ROWS, dtype=np.int64)
    for _ in range(repeats):
        anywhere = pool.rng.choice(NUM_ROWS, LOOKUP_ROWS, replace=False)
        resident = pool.rows(resident=True, number=LOOKUP_ROWS)
        lookups.append(timed(partial(pool.emb.lookup, anywhere)))
        steps.append(timed(partial(pool.step, resident, once)))
    return lookups, steps


def measure_admission(pool: Pool, repeats: int) -> Microseconds:
    """Steps of absent rows, each of which displaces another."""
    found = []
    for _ in range(repeats):
        row_ids = pool.rows(resident=False, number=ADMITTED_ROWS)
        evictions = pool.emb.num_evictions
        found.append(timed(partial(pool.step, row_ids, np.full(ADMITTED_ROWS, HOT))))
        assert pool.emb.num_evictions == evictions + ADMITTED_ROWS
    return found


def measure_moves(pool: Pool, to: Tenant) -> Microseconds:
    """Per page, of moves one way."""
    boundary = pool.boundary
    boundary.set_target(1.0 if to is Tenant.EMB else 0.0)
    found = []
    for _ in range(MOVES_PER_ROUND):
        # Other work than moves is done in between.
        pool.emb.lookup(pool.rng.integers(NUM_ROWS, size=LOOKUP_ROWS))
        pages = boundary.num_moved_pages
        taken = timed(boundary.step)
        assert boundary.num_moved_pages == pages + boundary.max_pages_per_step
        found.append(taken / boundary.max_pages_per_step)
    return found


class Moved(NamedTuple):
    """Microseconds per page."""

    to_emb: Microseconds
    to_kv: Microseconds
    rows_per_page: float
    """Rows that moved to other slots, for each page to KV."""


def measure_rounds(seed: int, rounds: int, prepare: Callable[[Pool], None]) -> Moved:
    """Pages to KV and back, so many times; the pool is prepared before each way."""
    pool = Pool(seed)
    to_emb: Microseconds = []
    to_kv: Microseconds = []
    for _ in range(1 + rounds):
        prepare(pool)
        to_kv += measure_moves(pool, Tenant.KV)
        prepare(pool)
        to_emb += measure_moves(pool, Tenant.EMB)
    pool.check_integrity()
    num_pages = pool.boundary.num_moved_pages / 2
    # The first round compiles, and meets memory that was never touched.
    warm = slice(MOVES_PER_ROUND, None)
    return Moved(to_emb[warm], to_kv[warm], pool.boundary.num_moved_rows / num_pages)


def leave_empty(pool: Pool) -> None:
    """Pages hold nothing."""


def make_evictable(pool: Pool) -> None:
    """Every KV block can be reused and every row is cold."""
    pool.fill_slots()
    pool.cool_off()
    pool.hash_free_blocks()


def scatter_hot_rows(pool: Pool) -> None:
    """Every second row is hot, wherever it is."""
    pool.cool_off()
    pool.fill_slots()


PREPARED = {"empty": leave_empty, "evictable": make_evictable, "scattered": scatter_hot_rows}


def bytes_held(owner: object) -> int:
    """Of all arrays that an object of the pool has, alone or through objects of its own."""
    return sum(_bytes_by_address(owner).values())


def _bytes_by_address(owner: object) -> dict[int, int]:
    """Parts of a tenant share arrays, and a view begins where its array does."""
    held: dict[int, int] = {}
    for value in vars(owner).values():
        if isinstance(value, np.ndarray):
            held[value.ctypes.data] = max(held.get(value.ctypes.data, 0), value.nbytes)
        elif type(value).__module__.startswith("block_manager.") and hasattr(value, "__dict__"):
            held |= _bytes_by_address(value)
    return held


def bytes_per_unit() -> dict[str, float]:
    """Bytes that one unit more takes, of rows, slots and blocks each."""

    def emb(num_rows: int, num_pages: int) -> int:
        no_page = np.empty(0, dtype=np.int64)
        return bytes_held(EmbeddingCache(no_page, LAYOUT.rows_per_page, num_rows, num_pages))

    base, more = 1 << 16, 1 << 17  # The table of hashes grows by powers of two.
    least = emb(base, 1)
    kv = [bytes_held(BlockPool(np.arange(number))) for number in (base - 1, more - 1)]
    return {
        "bytes_per_row": (emb(more, 1) - least) / base,
        "bytes_per_slot": (emb(base, 1 + base) - least) / (base * LAYOUT.rows_per_page),
        "bytes_per_block": (kv[1] - kv[0]) / base,
    }


def alloc_vs_vllm() -> dict[str, Any]:
    """Time of our block pool over that of vLLM's own, the worse of the sizes of a request."""
    if not vllm_blocks.has_vllm():
        return {"alloc_vs_vllm_ratio": None, "alloc_vs_vllm_reason": "vllm is not installed"}
    found = vllm_blocks.measure()
    return {"alloc_vs_vllm_ratio": vllm_blocks.worst_ratio(found), "alloc_vs_vllm": found}


def quartiles(values: Microseconds) -> list[float]:
    """The middle half of them."""
    found: list[float] = np.quantile(values, [0.25, 0.75]).tolist()
    return found


def measure(seeds: list[int], repeats: int, rounds: int) -> dict[str, Any]:
    """All figures, over all seeds."""
    lookups: Microseconds = []
    steps: Microseconds = []
    admissions: Microseconds = []
    moves: dict[str, list[Moved]] = {name: [] for name in PREPARED}
    for seed in seeds:
        pool = Pool(seed)
        pool.fill_slots()
        looked_up, stepped = measure_lookup(pool, repeats)
        lookups += looked_up
        steps += stepped
        admissions += measure_admission(pool, repeats)
        pool.check_integrity()
        for name, prepare in PREPARED.items():
            moves[name].append(measure_rounds(seed, rounds, prepare))
    to_emb = {
        name: [*chain.from_iterable(one.to_emb for one in found)] for name, found in moves.items()
    }
    to_kv = {
        name: [*chain.from_iterable(one.to_kv for one in found)] for name, found in moves.items()
    }
    rows = {
        name: float(np.mean([one.rows_per_page for one in found])) for name, found in moves.items()
    }
    emb_us = {name: float(np.median(found)) for name, found in to_emb.items()}
    kv_us = {name: float(np.median(found)) for name, found in to_kv.items()}
    added = kv_us["scattered"] - kv_us["evictable"]
    timings = {"lookup_10k": lookups, "plan_10k": steps, "admit_evict_1k": admissions}
    return {
        **{f"{name}_us": float(np.median(found)) for name, found in timings.items()},
        **{f"{name}_us_spread": quartiles(found) for name, found in timings.items()},
        "page_move_us": (emb_us["evictable"] + kv_us["evictable"]) / 2,
        "compaction_us_per_row": added / rows["scattered"],
        "page_moves": [
            {
                "content": name,
                "to_emb_us": emb_us[name],
                "to_emb_us_spread": quartiles(to_emb[name]),
                "to_kv_us": kv_us[name],
                "to_kv_us_spread": quartiles(to_kv[name]),
                "moved_rows_per_page": rows[name],
            }
            for name in PREPARED
        ],
    }


def main() -> None:
    """Measures and writes medians with their spread."""
    arguments = benchmark_parser(__doc__).parse_args()
    sizes = (QUICK_REPEATS, QUICK_ROUNDS) if arguments.quick else (REPEATS, ROUNDS)
    figures = measure(arguments.seeds, *sizes)
    pool = {"pages": LAYOUT.num_pages, "rows": NUM_ROWS, "rows_per_page": LAYOUT.rows_per_page}
    write_result(
        arguments.json,
        {**figures, **bytes_per_unit(), **alloc_vs_vllm(), "pool": pool},
        arguments.seeds,
    )


if __name__ == "__main__":
    main()

"""Compiles the engine's kernels once, so that the first start finds them on disk.

python -m helm_engine.compile_kernels
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import astuple

from block_manager.block_hash import BLOCK_HASH_BYTES, BlockHash
from block_manager.block_pool import BlockPool
from block_manager.distinct_rows import DistinctRows
from block_manager.embedding_cache import EmbeddingCache
from block_manager.page_value import PageValueEstimator, SamplingConfig
from block_manager.reuse_distance import PageCosts
from helm_engine.controller.observation import Observation
from helm_engine.controller.observation_sums import (
    add_arrival,
    add_ended,
    observation_sums,
    observe,
)
from helm_engine.controller.policy_network import best_action
from helm_engine.datasets.ml100k import MovieLens100K
from helm_engine.engine_choice import load_routing_kernels
from helm_engine.request_trace.siphash import SipKey, siphash
from helm_engine.simulator.events.law import Asked, EventLaw
from helm_engine.simulator.events.ml100k import MovieLensLaw
from helm_engine.simulator.events.production import ProductionLaw
from helm_engine.simulator.trace import make_trace
from helm_engine.simulator.workloads import load_workload
from model_executor.attention.cpu_fused import compile_kernels
from model_executor.page_arena import row_addresses
from model_executor.paged_batch import build_paged_batch
from model_executor.step import ScheduledRequest


def _compile_page_values(slot_of_row: npt.NDArray[np.int32]) -> None:
    """Two visits of a user, and a step."""
    one = PageValueEstimator(2, 1, 1, 1, PageCosts(1.0, 1.0, 1.0), SamplingConfig(1.0, 1.0))
    row = np.zeros(1, dtype=np.int64)
    one.set_capacity(1, 1)
    for _ in range(2):
        hashes = [BlockHash(bytes(BLOCK_HASH_BYTES))]
        one.observe_request(1, hashes, row, row, slot_of_row, 0, 1)
    one.observe_step(row, row, 0.0)
    one.set_capacity(2, 0)
    one.estimate(1.0)


def _compile_observation() -> None:
    """What a controller sees of an arrival, an ended request and a query, and the network."""
    totals = 7 * (0.0,)
    sums = observation_sums(1.0, 1, 1, totals, (1.0, 1.0, 1.0), 0.0)
    add_arrival(sums, 0.0)
    add_ended(sums, 0.0, 0.0, 0.0, 1, False, False)
    seen = Observation(*observe(sums, 0.0, totals, *(9 * (0.0,))))
    seen.vector()
    best_action(astuple(seen), np.zeros(1 << 10, dtype=np.float32), 1, 1)


def _compile_event_laws() -> None:
    """One event and one candidate of each law that no trace here is drawn from."""
    one, none = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    asked = Asked(none, one, none, one, one, none)
    regimes = load_workload("steady", "production").regimes
    ratings = MovieLens100K.from_rows(np.ones((1, 4), dtype=np.int64))
    laws: list[EventLaw] = [ProductionLaw(1000, regimes), MovieLensLaw(ratings, regimes)]
    for law in laws:
        law.draw(asked, np.random.default_rng(0), (0, 0))


def main() -> None:
    """Compiles both tenants' books, steps' arrays, attention of CPUs, draws and routing."""
    BlockPool(np.arange(1))
    row = np.zeros(1, dtype=np.int64)
    distinct, cache = DistinctRows(1), EmbeddingCache(row, rows_per_page=1, num_rows=1)
    distinct.count(row, [1], cache.slot_of_row)
    found = distinct.of(row)
    cache.commit(cache.plan(found.row_ids, found.counts))
    cache.shrink(1)
    cache.grow(row)
    cache.plan_refill(1)
    _compile_page_values(cache.slot_of_row)
    row_addresses(row, row, 1, 1, 1, 1)
    request = ScheduledRequest("", 0, row, row, features=row.reshape(1, 1), task=None)
    build_paged_batch([request], 1, torch.device("cpu"))
    compile_kernels()
    make_trace(load_workload("steady"), seed=0, scale=2)
    _compile_event_laws()
    siphash(row.view(np.uint64).reshape(-1, 1), SipKey(0, 0))
    _compile_observation()
    load_routing_kernels()


if __name__ == "__main__":
    main()

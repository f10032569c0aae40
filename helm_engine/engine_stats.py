"""The state of an engine in numbers, as its process reports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from helm_engine.scheduler import Scheduler


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges of the present state, and totals since the engine started."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of the KV blocks that running requests hold, 0..1."""
    emb_cache_usage: float = 0.0
    """Share of the EMB slots that hold rows, 0..1."""
    emb_fraction_committed: float = 0.0
    """Share of the pool's pages that EMB holds, 0..1."""
    steps: int = 0
    prefix_queries: int = 0
    """Context tokens of admitted requests."""
    prefix_hits: int = 0
    row_queries: int = 0
    """Distinct rows looked up, by step."""
    row_hits: int = 0
    kv_evictions: int = 0
    """Reusable blocks given to other histories."""
    emb_evictions: int = 0
    """Rows that gave up their slot."""

    @classmethod
    def of(cls, scheduler: Scheduler) -> EngineStats:
        """Reads a scheduler and its pool."""
        totals = scheduler.stats
        return cls(
            num_requests_running=scheduler.num_running,
            num_requests_waiting=scheduler.num_waiting,
            kv_cache_usage=scheduler.kv.pool.usage,
            emb_cache_usage=scheduler.emb.usage,
            emb_fraction_committed=scheduler.pool.committed,
            steps=totals.steps,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            row_queries=totals.row_queries,
            row_hits=totals.row_hits,
            kv_evictions=scheduler.kv.pool.num_evictions,
            emb_evictions=scheduler.emb.num_evictions,
        )

"""The state of an engine in numbers, as its process reports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from block_manager.page_value import PageValue
from block_manager.refill import HostTraffic, TrafficClass

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
    emb_fraction_target: float = 0.0
    """The share that was asked for."""
    emb_fraction_reachable: float = 0.0
    """What floors leave of it."""
    boundary_lag_pages: int = 0
    """Pages that EMB has yet to get; below 0: to give."""
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
    pages_moved: int = 0
    """Pages that changed hands between the tenants."""
    rows_moved: int = 0
    """Rows that were copied to another slot because their page left."""

    host_bytes: tuple[int, ...] = (0,) * len(TrafficClass)
    """Bytes that came from the host tier, by `TrafficClass`."""
    host_read_failures: tuple[int, ...] = (0,) * len(TrafficClass)
    """Reads whose rows could not be had, likewise."""
    kv_page_gain_ms: float = 0.0
    """Milliseconds per second that one KV page more would save; 0 without a cost profile."""
    kv_page_loss_ms: float = 0.0
    """What one KV page less would cost, likewise."""
    emb_page_gain_ms: float = 0.0
    emb_page_loss_ms: float = 0.0

    @classmethod
    def of(cls, scheduler: Scheduler, traffic: HostTraffic) -> EngineStats:
        """Reads a scheduler, its pool, and what its executor had from the host tier."""
        totals = scheduler.stats
        watched = scheduler.page_values
        value = PageValue() if watched is None else watched.latest
        return cls(
            num_requests_running=scheduler.num_running,
            num_requests_waiting=scheduler.num_waiting,
            kv_cache_usage=scheduler.kv.pool.usage,
            emb_cache_usage=scheduler.emb.usage,
            emb_fraction_committed=scheduler.pool.committed,
            emb_fraction_target=scheduler.boundary.target,
            emb_fraction_reachable=scheduler.boundary.reachable,
            boundary_lag_pages=scheduler.boundary.lag_pages,
            steps=totals.steps,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            row_queries=totals.row_queries,
            row_hits=totals.row_hits,
            kv_evictions=scheduler.kv.pool.num_evictions,
            emb_evictions=scheduler.emb.num_evictions,
            pages_moved=scheduler.boundary.num_moved_pages,
            rows_moved=scheduler.boundary.num_moved_rows,
            host_bytes=tuple(map(traffic.num_bytes, TrafficClass)),
            host_read_failures=tuple(map(traffic.num_failures, TrafficClass)),
            kv_page_gain_ms=value.kv.more,
            kv_page_loss_ms=value.kv.less,
            emb_page_gain_ms=value.emb.more,
            emb_page_loss_ms=value.emb.less,
        )

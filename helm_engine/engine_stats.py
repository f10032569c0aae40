"""The state of an engine in numbers, as its process reports it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import msgspec

from block_manager.page_value import PageValue
from block_manager.refill import HostTraffic, TrafficClass

if TYPE_CHECKING:
    from helm_engine.controller.engine_control import EngineControl
    from helm_engine.scheduler import Scheduler


class ControllerStats(msgspec.Struct, frozen=True):
    """What a controller last decided, and totals since the engine started; 0 without one."""

    rate: float = 0.0
    """Share of the pool per second by which the target changes; above 0 = EMB grows."""
    base_rate: float = 0.0
    """What the policy alone wants, -1..1 of the slew limit."""
    residual_rate: float = 0.0
    """What the residual adapter adds to it, likewise."""
    recovery_rate: float = 0.0
    """What a recovery makes of that, likewise; 0 without one."""
    is_holding: bool = False
    """Whether the committed split is held for want of numbers."""
    queries: int = 0
    """Times that a policy was asked."""
    holds: int = 0
    """Those that ended in holding the committed split."""
    recoveries: int = 0
    """Bursts that overrode the policy."""
    p99_ms: float = 0.0
    """Latency as the controller saw it."""
    slo_violation_rate: float = 0.0
    """Requests that failed or took longer than the service level, likewise, 0..1."""

    @classmethod
    def of(cls, control: EngineControl) -> ControllerStats:
        """Reads a controller."""
        controller = control.controller
        latest = controller.latest
        totals = cls(
            queries=controller.num_queries,
            holds=controller.num_holds,
            recoveries=controller.num_recoveries,
        )
        if latest is None:
            return totals
        seen = latest.observation
        return msgspec.structs.replace(
            totals,
            rate=latest.rate,
            base_rate=latest.parts.get("base", 0.0),
            residual_rate=latest.parts.get("residual", 0.0),
            recovery_rate=latest.parts.get("recovery", 0.0),
            is_holding=latest.held is not None,
            p99_ms=0.0 if seen is None else seen.p99_ms,
            slo_violation_rate=0.0 if seen is None else seen.slo_violation_rate,
        )


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
    controller: ControllerStats = ControllerStats()
    kv_event_batches: int = 0
    """Batches of KV events that were published."""

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        traffic: HostTraffic,
        control: EngineControl | None = None,
        kv_event_batches: int = 0,
    ) -> EngineStats:
        """Reads a scheduler, its pool, what its executor had from the host tier, its controller."""
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
            controller=ControllerStats() if control is None else ControllerStats.of(control),
            kv_event_batches=kv_event_batches,
        )


def together(reports: Sequence[EngineStats]) -> EngineStats:
    """The state of several engines as that of one: counts are added, all else is averaged."""
    combined: EngineStats = _together(reports)
    return combined


def _together(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, msgspec.Struct):
        fields = first.__struct_fields__
        return type(first)(
            **{field: _together([getattr(value, field) for value in values]) for field in fields}
        )
    if isinstance(first, tuple):
        return tuple(map(_together, zip(*values, strict=True)))
    if isinstance(first, bool):
        return any(values)
    return sum(values) if isinstance(first, int) else fmean(values)

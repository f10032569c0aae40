"""What each engine of a fleet last reported, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from block_manager.refill import TrafficClass
from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_stats import ControllerStats, EngineStats
from helm_engine.fleet_requests import Post
from helm_engine.request_trace.recorder import TraceRecorder


class _Families:
    """Metrics of which each has several samples, such as one for each engine."""

    def __init__(self) -> None:
        self._known: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._known.values())

    def gauge(self, name: str, help_text: str, labels: Mapping[str, str], value: float) -> None:
        """Adds a sample of a gauge."""
        if name not in self._known:
            self._known[name] = GaugeMetricFamily(f"helm:{name}", help_text, labels=list(labels))
        self._known[name].add_metric(list(labels.values()), value)

    def counter(self, name: str, help_text: str, labels: Mapping[str, str], value: float) -> None:
        """Adds a sample of a counter."""
        if name not in self._known:
            self._known[name] = CounterMetricFamily(f"helm:{name}", help_text, labels=list(labels))
        self._known[name].add_metric(list(labels.values()), value)


class EngineCollector(Collector):
    """Reads the engines' last reports when scraped, so that steps pay nothing for metrics."""

    def __init__(self, fleet: EngineFleet, recorder: TraceRecorder | None) -> None:
        self._fleet = fleet
        self._recorder = recorder

    def collect(self) -> Iterator[Metric]:
        """Gauges of the present state and totals since the engines started."""
        families, fleet = _Families(), self._fleet
        fleet.refresh()
        of_model = {"model_name": fleet.model_name}
        for post in fleet.posts:
            _post(families, {**of_model, "engine": post.name}, post)
        requests = fleet.requests
        for counter, help_text, value in (
            ("request_retries", "Requests that a second engine had to take.", requests.num_retries),
            ("request_hedges", "Requests given to a second engine as well.", requests.num_hedges),
            ("request_hedges_won", "Those that it answered first.", requests.num_hedges_won),
        ):
            families.counter(counter, help_text, of_model, value)
        if self._recorder is not None:
            recorded, lost = self._recorder.num_recorded, self._recorder.num_lost
            recorded_text, lost_text = "Requests in the trace.", "Requests missing in the trace."
            families.counter("trace_requests_recorded", recorded_text, of_model, recorded)
            families.counter("trace_requests_lost", lost_text, of_model, lost)
        yield from families


def _post(families: _Families, labels: Mapping[str, str], post: Post) -> None:
    """What the front knows of an engine, and what the engine says."""
    families.gauge("engine_up", "Whether it can answer requests.", labels, post.is_ready)
    for counter, help_text, value in (
        ("engine_restarts", "Engines that died, hung or were lost.", post.member.num_restarts),
        ("model_reloads", "Models put in another's place.", post.member.num_reloads),
        ("engine_requests", "Requests given to the engine.", post.num_requests),
    ):
        families.counter(counter, help_text, labels, value)
    if post.is_ready and post.engine is not None:
        stats = post.engine.client.stats
        _gauges(families, labels, stats)
        _counters(families, labels, stats)
        _controller(families, labels, stats.controller)


def _gauges(families: _Families, labels: Mapping[str, str], stats: EngineStats) -> None:
    for gauge, help_text, value in (
        ("num_requests_running", "Requests that hold blocks.", stats.num_requests_running),
        ("num_requests_waiting", "Requests in the queue.", stats.num_requests_waiting),
        (
            "kv_cache_usage_perc",
            "Share of the KV blocks that running requests hold, 0..1.",
            stats.kv_cache_usage,
        ),
        (
            "emb_cache_usage_perc",
            "Share of the EMB slots that hold rows, 0..1.",
            stats.emb_cache_usage,
        ),
        (
            "emb_fraction_committed",
            "Share of the pool's pages that EMB holds, 0..1.",
            stats.emb_fraction_committed,
        ),
        (
            "emb_fraction_target",
            "Share of the pool's pages that was asked for for EMB, 0..1.",
            stats.emb_fraction_target,
        ),
        (
            "boundary_lag_pages",
            "Pages that EMB has yet to get; below 0: to give.",
            stats.boundary_lag_pages,
        ),
    ):
        families.gauge(gauge, help_text, labels, value)
    for tenant, gain, loss in (
        ("kv", stats.kv_page_gain_ms, stats.kv_page_loss_ms),
        ("emb", stats.emb_page_gain_ms, stats.emb_page_loss_ms),
    ):
        saves = f"Milliseconds per second that one {tenant.upper()} page more would save."
        costs = f"Milliseconds per second that one {tenant.upper()} page less would cost."
        families.gauge(f"{tenant}_page_gain_ms", saves, labels, gain)
        families.gauge(f"{tenant}_page_loss_ms", costs, labels, loss)


def _counters(families: _Families, labels: Mapping[str, str], stats: EngineStats) -> None:
    for counter, help_text, value in (
        ("engine_steps", "Steps planned.", stats.steps),
        ("prefix_cache_queries", "Context tokens of admitted requests.", stats.prefix_queries),
        ("prefix_cache_hits", "Context tokens whose KV was reused.", stats.prefix_hits),
        ("emb_cache_queries", "Distinct rows looked up, by step.", stats.row_queries),
        ("emb_cache_hits", "Those that were in the pool.", stats.row_hits),
        ("kv_cache_evictions", "Reusable blocks given to other histories.", stats.kv_evictions),
        ("emb_cache_evictions", "Rows that gave up their slot.", stats.emb_evictions),
        ("pages_moved", "Pages that changed hands between tenants.", stats.pages_moved),
        ("rows_moved", "Rows copied because their page left.", stats.rows_moved),
    ):
        families.counter(counter, help_text, labels, value)
    _by_class(
        families, labels, "host_bytes", "Bytes that came from the host tier.", stats.host_bytes
    )
    _by_class(
        families,
        labels,
        "host_read_failures",
        "Reads of the host tier whose rows could not be had.",
        stats.host_read_failures,
    )


def _by_class(
    families: _Families, labels: Mapping[str, str], name: str, help_text: str, values: Sequence[int]
) -> None:
    """What came from the host tier, by traffic class."""
    for traffic, value in zip(TrafficClass, values, strict=True):
        families.counter(name, help_text, {**labels, "class": traffic.name.lower()}, value)


def _controller(families: _Families, labels: Mapping[str, str], stats: ControllerStats) -> None:
    """What the controller of the boundary decided, and why; all 0 without one."""
    wants = "What each layer wants, -1..1 of the slew limit: base + residual, or recovery."
    for layer, rate in (
        ("base", stats.base_rate),
        ("residual", stats.residual_rate),
        ("recovery", stats.recovery_rate),
    ):
        families.gauge("controller_layer_rate", wants, {**labels, "layer": layer}, rate)
    for gauge, help_text, value in (
        ("rate", "Share of the pool per second by which the target changes.", stats.rate),
        ("holding", "Whether the split is held for want of numbers.", stats.is_holding),
        ("p99_ms", "99th percentile of the latency as the controller sees it.", stats.p99_ms),
        (
            "slo_violation_share",
            "Requests that failed or took longer than --slo-ms, lately, 0..1.",
            stats.slo_violation_rate,
        ),
    ):
        families.gauge(f"controller_{gauge}", help_text, labels, value)
    for counter, help_text, value in (
        ("queries", "Times that the policy was asked.", stats.queries),
        ("holds", "Those that ended in holding the split.", stats.holds),
        ("recoveries", "Bursts that overrode the policy.", stats.recoveries),
    ):
        families.counter(f"controller_{counter}", help_text, labels, value)

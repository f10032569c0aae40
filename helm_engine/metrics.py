"""Prometheus metrics of a front and its engine, with vLLM's naming habits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from block_manager.refill import TrafficClass
from helm_engine.engine_stats import ControllerStats, EngineStats
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Recommendation
from helm_engine.request_trace.recorder import TraceRecorder

LATENCY_BUCKETS_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03,
    0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0,
)  # fmt: skip
"""1 ms to 1 s, the usual range of recommenders."""


TOKEN_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class _EngineCollector(Collector):
    """Reads the engine's last report when scraped, so that steps pay nothing for metrics."""

    def __init__(self, supervisor: EngineSupervisor, recorder: TraceRecorder | None) -> None:
        self._supervisor = supervisor
        self._recorder = recorder

    def collect(self) -> Iterator[Metric]:
        """Gauges of the present state and totals since the engine started."""
        supervisor = self._supervisor
        yield _gauge("engine_up", "Whether requests can be answered.", "", supervisor.is_ready)
        name = supervisor.config.model_name
        restarts, reloads = supervisor.num_restarts, supervisor.num_reloads
        yield _counter("engine_restarts", "Engines that died or hung.", name, restarts)
        yield _counter("model_reloads", "Models put in another's place.", name, reloads)
        if self._recorder is not None:
            recorded, lost = self._recorder.num_recorded, self._recorder.num_lost
            yield _counter("trace_requests_recorded", "Requests in the trace.", name, recorded)
            yield _counter("trace_requests_lost", "Requests missing in the trace.", name, lost)
        if not supervisor.is_ready:
            return
        stats = supervisor.engine.client.stats
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
            yield _gauge(gauge, help_text, name, value)
        yield from _page_values(stats, name)
        yield from _controller(stats.controller, name)
        for counter, help_text, value in (
            ("engine_steps", "Steps planned.", stats.steps),
            ("prefix_cache_queries", "Context tokens of admitted requests.", stats.prefix_queries),
            ("prefix_cache_hits", "Context tokens whose KV was reused.", stats.prefix_hits),
            ("emb_cache_queries", "Distinct rows looked up, by step.", stats.row_queries),
            ("emb_cache_hits", "Those that were in the pool.", stats.row_hits),
            (
                "kv_cache_evictions",
                "Reusable blocks given to other histories.",
                stats.kv_evictions,
            ),
            ("emb_cache_evictions", "Rows that gave up their slot.", stats.emb_evictions),
            ("pages_moved", "Pages that changed hands between tenants.", stats.pages_moved),
            ("rows_moved", "Rows copied because their page left.", stats.rows_moved),
        ):
            yield _counter(counter, help_text, name, value)
        yield from _host_counters(stats, name)


def _page_values(stats: EngineStats, model_name: str) -> Iterator[Metric]:
    for tenant, gain, loss in (
        ("kv", stats.kv_page_gain_ms, stats.kv_page_loss_ms),
        ("emb", stats.emb_page_gain_ms, stats.emb_page_loss_ms),
    ):
        saves = f"Milliseconds per second that one {tenant.upper()} page more would save."
        costs = f"Milliseconds per second that one {tenant.upper()} page less would cost."
        yield _gauge(f"{tenant}_page_gain_ms", saves, model_name, gain)
        yield _gauge(f"{tenant}_page_loss_ms", costs, model_name, loss)


def _controller(stats: ControllerStats, model_name: str) -> Iterator[Metric]:
    """What the controller of the boundary decided, and why; all 0 without one."""
    layers = GaugeMetricFamily(
        "helm:controller_layer_rate",
        "What each layer wants, -1..1 of the slew limit: base + residual, or recovery.",
        labels=["model_name", "layer"],
    )
    layers.add_metric([model_name, "base"], stats.base_rate)
    layers.add_metric([model_name, "residual"], stats.residual_rate)
    layers.add_metric([model_name, "recovery"], stats.recovery_rate)
    yield layers
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
        yield _gauge(f"controller_{gauge}", help_text, model_name, value)
    for counter, help_text, value in (
        ("queries", "Times that the policy was asked.", stats.queries),
        ("holds", "Those that ended in holding the split.", stats.holds),
        ("recoveries", "Bursts that overrode the policy.", stats.recoveries),
    ):
        yield _counter(f"controller_{counter}", help_text, model_name, value)


def _gauge(name: str, help_text: str, model_name: str, value: float) -> Metric:
    labels = {"model_name": model_name} if model_name else {}
    gauge = GaugeMetricFamily(f"helm:{name}", help_text, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge


def _counter(name: str, help_text: str, model_name: str, value: float) -> Metric:
    counter = CounterMetricFamily(f"helm:{name}", help_text, labels=["model_name"])
    counter.add_metric([model_name], value)
    return counter


def _host_counters(stats: EngineStats, model_name: str) -> Iterator[Metric]:
    """What came from the host tier, by traffic class."""
    yield _counter_by_class(
        "host_bytes", "Bytes that came from the host tier.", model_name, stats.host_bytes
    )
    yield _counter_by_class(
        "host_read_failures",
        "Reads of the host tier whose rows could not be had.",
        model_name,
        stats.host_read_failures,
    )


def _counter_by_class(name: str, help_text: str, model_name: str, values: Sequence[int]) -> Metric:
    counter = CounterMetricFamily(f"helm:{name}", help_text, labels=["model_name", "class"])
    for traffic, value in zip(TrafficClass, values, strict=True):
        counter.add_metric([model_name, traffic.name.lower()], value)
    return counter


class _ModelMetrics(NamedTuple):
    """What is counted of one model's answers."""

    success: Counter
    latency: Histogram
    queue: Histogram
    load: Histogram
    prefill: Histogram
    score: Histogram
    tokens: Histogram
    candidates: Histogram


class EngineMetrics:
    """What a front exposes at `/metrics`."""

    def __init__(self, supervisor: EngineSupervisor, recorder: TraceRecorder | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(supervisor, recorder))
        ProcessCollector(registry=self._registry)
        self._supervisor = supervisor
        self._success = Counter(
            "helm:request_success", "Answered requests.", ["model_name"], registry=self._registry
        )
        self._failure = Counter(
            "helm:request_failure",
            "Requests that got an error, by its type.",
            ["model_name", "type"],
            registry=self._registry,
        )
        self._latency = self._seconds("e2e_request_latency", "From arrival to answer.")
        self._phases = {
            phase: self._seconds(f"request_{phase}_time", f"Time in the {phase} phase.")
            for phase in ("queue", "load", "prefill", "score")
        }
        self._tokens = self._histogram(
            "request_history_tokens", "Context tokens of answered requests.", TOKEN_BUCKETS
        )
        self._candidates = self._histogram(
            "request_candidates", "Candidates of answered requests.", TOKEN_BUCKETS
        )
        self._by_model: dict[str, _ModelMetrics] = {}
        self._of_model(supervisor.config.model_name)

    def _seconds(self, name: str, help_text: str) -> Histogram:
        return self._histogram(f"{name}_seconds", help_text, LATENCY_BUCKETS_SECONDS)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"helm:{name}", help_text, ["model_name"], buckets=buckets, registry=self._registry
        )

    def count_success(self, answer: Recommendation, seconds: float) -> None:
        """Counts an answered request and how long it took."""
        usage, timings = answer.usage, answer.usage.timings_ms
        count = self._of_model(answer.model)
        count.success.inc()
        count.latency.observe(seconds)
        count.queue.observe(timings.queue / 1e3)
        count.load.observe(timings.load / 1e3)
        count.prefill.observe(timings.prefill / 1e3)
        count.score.observe(timings.score / 1e3)
        count.tokens.observe(usage.history_tokens)
        count.candidates.observe(usage.candidates)

    def _of_model(self, name: str) -> _ModelMetrics:
        """The metrics of one model; looking up labels costs more than counting."""
        found = self._by_model.get(name)
        if found is None:
            histograms = (self._latency, *self._phases.values(), self._tokens, self._candidates)
            found = _ModelMetrics(
                self._success.labels(name), *(one.labels(name) for one in histograms)
            )
            self._by_model[name] = found
        return found

    def count_failure(self, error: HelmError) -> None:
        """Counts a request that got an error."""
        self._failure.labels(self._supervisor.config.model_name, error.error_type).inc()

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

"""Prometheus metrics of one engine, with vLLM's naming habits."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from helm_engine.exceptions import HelmError
from helm_engine.protocol import Usage
from helm_engine.scheduler import Scheduler

LATENCY_BUCKETS_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03,
    0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0,
)  # fmt: skip
"""1 ms to 1 s, the usual range of recommenders."""


class _SchedulerCollector(Collector):
    """Reads the scheduler when scraped, so that steps pay nothing for metrics."""

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self._scheduler = scheduler
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Gauges of the present state and totals since the start."""
        scheduler = self._scheduler
        stats = scheduler.stats
        gauges = {
            "helm:num_requests_running": ("Requests that hold blocks.", scheduler.num_running),
            "helm:num_requests_waiting": ("Requests in the queue.", scheduler.num_waiting),
            "helm:kv_cache_usage_perc": (
                "Share of the KV blocks that running requests hold, 0..1.",
                scheduler.kv.pool.usage,
            ),
            "helm:emb_cache_usage_perc": (
                "Share of the EMB slots that hold rows, 0..1.",
                scheduler.emb.usage,
            ),
            "helm:emb_fraction_committed": (
                "Share of the pool's pages that EMB holds, 0..1.",
                scheduler.pool.committed,
            ),
        }
        counters = {
            "helm:engine_steps": ("Steps planned.", stats.steps),
            "helm:prefix_cache_queries": (
                "History tokens of admitted requests.",
                stats.prefix_queries,
            ),
            "helm:prefix_cache_hits": ("History tokens whose KV was reused.", stats.prefix_hits),
            "helm:emb_cache_queries": ("Distinct rows looked up, by step.", stats.row_queries),
            "helm:emb_cache_hits": ("Those that were in the pool.", stats.row_hits),
            "helm:kv_cache_evictions": (
                "Reusable blocks given to other histories.",
                scheduler.kv.pool.num_evictions,
            ),
            "helm:emb_cache_evictions": (
                "Rows that gave up their slot.",
                scheduler.emb.num_evictions,
            ),
        }
        for name, (help_text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, help_text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (help_text, value) in counters.items():
            counter = CounterMetricFamily(name, help_text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter


class EngineMetrics:
    """What one engine exposes at `/metrics`."""

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(scheduler, model_name))
        self._model_name = model_name
        self._success = Counter(
            "helm:request_success", "Answered requests.", ["model_name"], registry=self._registry
        )
        self._failure = Counter(
            "helm:request_failure",
            "Requests that got an error, by its type.",
            ["model_name", "type"],
            registry=self._registry,
        )
        self._latency = self._histogram("e2e_request_latency", "From arrival to answer.")
        self._phases = {
            phase: self._histogram(f"request_{phase}_time", f"Time in the {phase} phase.")
            for phase in ("queue", "load", "prefill", "score")
        }
        self._success.labels(model_name)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(
            f"helm:{name}_seconds",
            help_text,
            ["model_name"],
            buckets=LATENCY_BUCKETS_SECONDS,
            registry=self._registry,
        )

    def count_success(self, usage: Usage, seconds: float) -> None:
        """Counts an answered request and how long it took."""
        self._success.labels(self._model_name).inc()
        self._latency.labels(self._model_name).observe(seconds)
        for phase, milliseconds in dict(usage.timings_ms).items():
            self._phases[phase].labels(self._model_name).observe(milliseconds / 1e3)

    def count_failure(self, error: HelmError) -> None:
        """Counts a request that got an error."""
        self._failure.labels(self._model_name, error.error_type).inc()

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

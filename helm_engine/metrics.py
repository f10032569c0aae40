"""Prometheus metrics of a front and its engines, with vLLM's naming habits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from helm_engine.engine_fleet import EngineFleet
from helm_engine.engine_metrics import EngineCollector
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Recommendation
from helm_engine.request_trace.recorder import TraceRecorder

LATENCY_BUCKETS_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03,
    0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0,
)  # fmt: skip
"""1 ms to 1 s, the usual range of recommenders."""


TOKEN_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


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

    def __init__(self, fleet: EngineFleet, recorder: TraceRecorder | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(fleet, recorder))
        ProcessCollector(registry=self._registry)
        self._fleet = fleet
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
        self._of_model(fleet.model_name)

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
        self._failure.labels(self._fleet.model_name, error.error_type).inc()

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

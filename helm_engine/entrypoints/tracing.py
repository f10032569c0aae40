"""OpenTelemetry spans of requests, where the operator wants them; extra `otel`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from helm_engine.entrypoints.request_ids import TraceIds
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Recommendation
from helm_engine.version import __version__

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_LAST_EXPORT_SECONDS = 2.0
"""Time for spans that are not yet sent when the server ends."""


class Span:
    """An open span; does nothing where nothing is traced."""

    def __init__(self, span: trace.Span | None = None) -> None:
        self._span = span

    @property
    def ids(self) -> TraceIds | None:
        """Its place in the trace."""
        if self._span is None:
            return None
        place = self._span.get_span_context()
        return TraceIds(
            f"{place.trace_id:032x}", f"{place.span_id:016x}", f"{int(place.trace_flags):02x}"
        )

    def describe(self, answer: Recommendation) -> None:
        """Adds what the request took and what the caches spared."""
        if self._span is None:
            return
        usage = answer.usage
        self._span.set_attributes(
            {
                "helm.request_id": answer.id,
                "helm.model": answer.model,
                "helm.usage.history_tokens": usage.history_tokens,
                "helm.usage.cached_tokens": usage.cached_tokens,
                "helm.usage.candidates": usage.candidates,
                "helm.usage.rows_requested": usage.rows_requested,
                "helm.usage.rows_resident": usage.rows_resident,
                "helm.latency.queue_ms": usage.timings_ms.queue,
                "helm.latency.load_ms": usage.timings_ms.load,
                "helm.latency.prefill_ms": usage.timings_ms.prefill,
                "helm.latency.score_ms": usage.timings_ms.score,
            }
        )


class Tracer:
    """Makes spans; without an exporter none."""

    def __init__(
        self, provider: TracerProvider | None = None, exporter: SpanExporter | None = None
    ) -> None:
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("helm_engine", __version__) if provider else None

    @classmethod
    def exporting_to(cls, endpoint: str) -> Tracer:
        """Spans go to an OTLP collector over HTTP.

        Args:
            endpoint: its traces URL, for instance http://localhost:4318/v1/traces.

        Raises:
            ValueError: the extra `otel` is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                "otlp_traces_endpoint: needs the extra otel: pip install 'helm-engine[otel]'"
            ) from error
        ours = {"service.name": "helm-engine", "service.version": __version__}
        # What the operator says in OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES comes first.
        resource = Resource(ours).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=endpoint)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, exporter)

    @contextmanager
    def server_span(self, path: str, remote_parent: TraceIds | None) -> Iterator[Span]:
        """The span of one `POST`, below the client's.

        Args:
            path: of the URL.
            remote_parent: the client's span, where it sent one.
        """
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry import trace

        below = None
        if remote_parent is not None:
            context = trace.SpanContext(
                trace_id=int(remote_parent.trace_id, 16),
                span_id=int(remote_parent.span_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(int(remote_parent.flags, 16)),
            )
            below = trace.set_span_in_context(trace.NonRecordingSpan(context))
        with self._tracer.start_as_current_span(
            f"POST {path}",
            context=below,
            kind=trace.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": path, "url.path": path},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            status = 500
            try:
                yield Span(span)
                status = 200
            except HelmError as error:
                span.set_attribute("error.type", error.error_type)
                status = error.status
                raise
            finally:
                span.set_attribute("http.response.status_code", status)
                # What a client did wrong is no failure of the server's.
                if status >= 500:
                    span.set_status(trace.StatusCode.ERROR)

    @contextmanager
    def request_span(self) -> Iterator[Span]:
        """The span of one request for recommendations, below the one that is open."""
        if self._tracer is None:
            yield Span()
            return
        with self._tracer.start_as_current_span("recommend", record_exception=False) as span:
            try:
                yield Span(span)
            except HelmError as error:
                span.set_attribute("error.type", error.error_type)
                raise

    def close(self) -> None:
        """Sends what has not been sent; a collector that is away is tried for a while only."""
        if self._provider is None or self._exporter is None:
            return
        # The exporter would go on trying for ten seconds.
        giving_up = threading.Timer(_LAST_EXPORT_SECONDS, self._exporter.shutdown)
        giving_up.start()
        self._provider.shutdown()
        giving_up.cancel()

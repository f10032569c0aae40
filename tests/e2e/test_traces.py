"""Spans as a collector receives them: a real one over HTTP, as small as can be."""

from __future__ import annotations

import gzip
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from helm_engine.entrypoints.http_server import open_socket
from tests.e2e.running_server import BUNDLED_MODEL, running_server

BODY = {"user": "ada", "history": {"item_ids": [50, 172, 181], "timestamps": [100, 160, 220]}}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
Received = queue.SimpleQueue[ExportTraceServiceRequest]


@contextmanager
def collector() -> Iterator[tuple[str, Received]]:
    """Its traces URL, and what it receives."""
    received: Received = queue.SimpleQueue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            received.put(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()
        thread.join()


def plain(attributes: Iterator[KeyValue]) -> dict[str, object]:
    """Attributes by name, each as the one kind of value that it has."""
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value")
        for one in attributes
    }


def test_spans_stand_below_the_clients_and_say_what_the_caches_spared() -> None:
    sampled = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "seven"}
    with (
        collector() as (url, received),
        running_server(BUNDLED_MODEL, "--otlp-traces-endpoint", url) as server,
    ):
        ask = server.address + "/v1/recommend"
        answer = httpx.post(ask, json=BODY, headers=sampled)
        httpx.post(ask, json={"requests": [BODY, {}]}, headers=sampled)
        assert httpx.post(ask, json={"history": 7}, headers=sampled).status_code == 400
        assert httpx.post(ask, json=BODY).status_code == 200  # A trace of its own.
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        not_sampled = httpx.post(ask, json=BODY, headers=unsampled)
        assert server.stop() == 0  # What was not yet sent is sent.
        sent: list[tuple[dict[str, object], Span]] = []
        while not received.empty():
            for of_resource in received.get().resource_spans:
                about = plain(iter(of_resource.resource.attributes))
                sent += [(about, s) for scope in of_resource.scope_spans for s in scope.spans]

    assert {about["service.name"] for about, _ in sent} == {"helm-engine"}
    ours = [span for _, span in sent if span.trace_id.hex() == TRACE]
    assert len(sent) - len(ours) == 2, "a request without traceparent has two spans"
    tops = [span for span in ours if span.kind == Span.SPAN_KIND_SERVER]
    assert [span.name for span in tops] == ["POST /v1/recommend"] * 3
    assert {span.parent_span_id.hex() for span in tops} == {PARENT}
    assert [plain(iter(s.attributes))["http.response.status_code"] for s in tops] == [200, 200, 400]
    # A client's mistake is no failure of the server's.
    assert {span.status.code for span in tops} == {Status.STATUS_CODE_UNSET}

    first = tops[0]
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{first.span_id.hex()}-01"
    assert not_sampled.headers["traceresponse"].endswith("-00")
    (inner,) = [span for span in ours if span.parent_span_id == first.span_id]
    attributes, usage = plain(iter(inner.attributes)), answer.json()["usage"]
    assert attributes["helm.request_id"] == answer.json()["id"] == "rec-seven"
    assert attributes["helm.model"] == "hstu-ml-100k"
    for name in ("history_tokens", "cached_tokens", "candidates", "rows_requested"):
        assert attributes[f"helm.usage.{name}"] == usage[name]
    for phase, milliseconds in usage["timings_ms"].items():
        assert attributes[f"helm.latency.{phase}_ms"] == milliseconds


def test_a_collector_that_is_away_hinders_nothing() -> None:
    with open_socket("127.0.0.1", 0) as nobody:  # Bound, but nobody listens.
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/traces"
        with running_server(BUNDLED_MODEL, "--otlp-traces-endpoint", url) as server:
            assert server.post(BODY).status_code == 200
            assert server.stop() == 0

"""Spans of requests: below whose they are, when they were, and none where nobody records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rayseek.cluster import traces

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def test_nobody_records() -> None:
    span = traces.begin("sequence", time.monotonic())
    assert traces.traceparent(span) == ""
    traces.record("prefill", "", 0.0, 1.0)


def test_a_call_from_outside(spans: InMemorySpanExporter) -> None:
    began = time.monotonic() - 2000.0
    with traces.serving("POST /v1", {"traceparent": CALLER}) as served:
        sequence = traces.begin("sequence", began)
        parent = traces.traceparent(sequence)
        traces.describe(served, http__route="/v1")
    with ThreadPoolExecutor(1) as other:  # another process, in what matters here
        other.submit(traces.record, "decode", parent, began, began + 1.5, rayseek__pages=3).result()
    traces.fail(sequence, "out of pages")
    sequence.end()
    outer, inner, below = (named(spans, n) for n in ("POST /v1", "sequence", "decode"))
    assert outer.parent and format(outer.parent.span_id, "016x") == "b7ad6b7169203331"
    assert {format(s.context.trace_id, "032x") for s in (outer, inner, below)} == {CALLER[3:35]}
    assert inner.parent and inner.parent.span_id == outer.context.span_id
    assert below.parent and below.parent.span_id == inner.context.span_id
    assert outer.attributes == {"http.route": "/v1"} and below.attributes == {"rayseek.pages": 3}
    assert below.start_time and below.end_time and inner.start_time
    assert below.end_time - below.start_time == pytest.approx(1.5e9, abs=1e7)
    assert inner.start_time == pytest.approx(time.time_ns() - 2000e9, abs=600e9)
    assert not inner.status.is_ok and not trace.get_current_span().is_recording()


def test_an_endpoint_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(traces.ENDPOINT, raising=False)
    traces.start_tracing("rank")
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)

"""OpenTelemetry spans: where a request's time went, in every process that it met.

`traces.endpoint` of the config, or the standard's OTEL_EXPORTER_OTLP_ENDPOINT, switches them on;
without it nothing is recorded. A request carries the W3C traceparent of its span in `Request.trace`
through the token channel, and processes tell of their part when it is over. Texts are never told.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

log = logging.getLogger("rayseek.traces")

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Attribute: TypeAlias = str | bool | int | float | Sequence[str]

_W3C = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("rayseek")


def start_tracing(process: str) -> None:
    """Send this process's spans to the endpoint, if there is one; a second call does nothing.

    process: becomes `service.instance.id`.
    """
    unset = isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    if not (unset and os.environ.get(ENDPOINT)):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as missing:
        log.warning("no traces: %s; install them by pip install 'rayseek[traces]'", missing)
        return
    about = Resource.create({"service.name": "rayseek", "service.instance.id": process})
    provider = TracerProvider(resource=about)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def traceparent(span: Span) -> str:
    """What stands for a span elsewhere; "" for one that nobody records."""
    if not span.is_recording():
        return ""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def record(name: str, parent: str, began: float, ended: float, **attributes: Attribute) -> None:
    """A span that is over, below `parent` (a traceparent; "": nothing is recorded).

    began, ended: time.monotonic() of this process. A double underscore in a name is a dot.
    """
    if not parent:
        return
    span = _tracer.start_span(
        name, _W3C.extract({"traceparent": parent}), start_time=_epoch_ns(began)
    )
    describe(span, **attributes)
    span.end(_epoch_ns(ended))


def begin(name: str, began: float) -> Span:
    """A span below the current one; who begins it ends it."""
    return _tracer.start_span(name, start_time=_epoch_ns(began))


def describe(span: Span, **attributes: Attribute) -> None:
    """Add attributes; a double underscore in a name is a dot."""
    for name, value in attributes.items():
        span.set_attribute(name.replace("__", "."), value)


def fail(span: Span, reason: str) -> None:
    """Mark a span as failed."""
    span.set_status(Status(StatusCode.ERROR, reason))


@contextmanager
def serving(name: str, headers: Mapping[str, str]) -> Iterator[Span]:
    """Around the answer to a call from outside, below the span that its headers name."""
    parent = _W3C.extract(headers)
    span = _tracer.start_span(name, parent, SpanKind.SERVER)
    token = context.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    finally:
        context.detach(token)
        span.end()


def _epoch_ns(monotonic: float) -> int:
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)

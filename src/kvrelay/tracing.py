"""How does one request become one trace across processes? Spans are made here, and their contexts ride in messages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvrelay.v1 import common_pb2

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Attribute = str | bool | int | float
Attributes = Mapping[str, Attribute]

_PROPAGATOR = TraceContextTextMapPropagator()
_EXPORT_TIMEOUT_S = 2.0
_EXPORT_INTERVAL_MS = 500
_QUEUE_SPANS = 16_384
"""A burst of 1,000 requests makes some 8,000 spans; the SDK's default of 2,048 drops most of them."""


class Headers(Protocol):
    """HTTP headers or gRPC metadata as a mapping with lower-case (or case-insensitive) keys."""

    def get(self, key: str, /) -> str | None: ...


class Span:
    """One piece of a request's work. End it once, in the process that started it.

    As a context manager it ends with the block, and is marked as failed by an exception.
    """

    __slots__ = ("_parent", "_span")

    def __init__(self, span: trace.Span, parent: common_pb2.TraceContext | None) -> None:
        self._span = span
        self._parent = parent

    @property
    def context(self) -> common_pb2.TraceContext:
        """What to send along, so that other spans become children of this one.

        Without tracing it is the parent's context: a caller's trace passes through a cluster that records nothing.
        """
        if not self._span.get_span_context().is_valid:
            return self._parent or common_pb2.TraceContext()
        return _to_message(self._span)

    @property
    def otel_span(self) -> trace.Span:
        """The span for libraries that know OpenTelemetry."""
        return self._span

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def event(self, name: str, unix_ns: int | None = None) -> None:
        """Add a point in time; now, when none is given."""
        self._span.add_event(name, timestamp=unix_ns)

    def fail(self, message: str) -> None:
        """Mark the span as failed. It still has to be ended."""
        self._span.set_status(Status(StatusCode.ERROR, message))

    def end(self, unix_ns: int | None = None) -> None:
        """End the span; now, when no time is given."""
        self._span.end(unix_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.fail("cancelled")
        elif error is not None and not isinstance(error, GeneratorExit):
            self.fail(f"{type(error).__name__}: {error}")
        self.end()


class Tracing:
    """Makes the spans of one process. Without a provider nothing is recorded and nothing costs anything."""

    def __init__(self, provider: TracerProvider | None = None, exporter: SpanExporter | None = None) -> None:
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("kvrelay") if provider else None

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._tracer is not None

    def start_span(
        self,
        name: str,
        parent: common_pb2.TraceContext | None = None,
        *,
        attributes: Attributes | None = None,
        start_unix_ns: int | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        """Start a span below `parent`, or a new trace without one. A malformed parent counts as none.

        With `start_unix_ns` (nanoseconds since the Unix epoch) a span can be made after the fact.
        """
        if self._tracer is None:
            return Span(trace.INVALID_SPAN, parent)
        context = Context() if parent is None else _PROPAGATOR.extract(headers_of(parent))
        span = self._tracer.start_span(name, context, kind, attributes, start_time=start_unix_ns)
        return Span(span, parent)

    def shutdown(self, timeout_s: float = 3.0) -> None:
        """Export what is left, for at most `timeout_s` and half a second; blocking, idempotent."""
        if self._provider is None:
            return
        thread = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive() and self._exporter is not None:
            self._exporter.shutdown()
            thread.join(0.5)
        self._provider = None
        self._tracer = None


def configure_tracing(
    service_name: str,
    otlp_endpoint: str | None,
    *,
    instance_id: str = "",
    attributes: Attributes | None = None,
    sample_ratio: float = 1.0,
    set_global: bool = True,
) -> Tracing:
    """Set this process's tracing up; call it before any library that sets a tracer provider of its own.

    `otlp_endpoint` is `http://host:port` (or https) of an OTLP gRPC receiver; None loads no SDK. `sample_ratio` is the
    share of the traces that begin here and are recorded; one that a caller began follows the caller's decision.
    Raises `ValueError` for an endpoint that is no such URL.
    """
    if otlp_endpoint is None:
        return Tracing()
    check_endpoint(otlp_endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = {"service.name": service_name, "service.namespace": "kvrelay", **(attributes or {})}
    if instance_id:
        resource["service.instance.id"] = instance_id
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        resource=Resource.create(resource),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=otlp_endpoint, timeout=_EXPORT_TIMEOUT_S)
    processor = BatchSpanProcessor(
        exporter, max_queue_size=_QUEUE_SPANS, schedule_delay_millis=_EXPORT_INTERVAL_MS, max_export_batch_size=512
    )
    provider.add_span_processor(processor)
    if set_global:
        trace.set_tracer_provider(provider)
    return Tracing(provider, exporter)


def check_endpoint(otlp_endpoint: str) -> None:
    """Raises `ValueError` unless it is a URL with a scheme, a host and a port."""
    try:
        url = urlsplit(otlp_endpoint)
        complete = url.scheme in ("http", "https") and url.hostname and url.port
    except ValueError:
        complete = False
    if not complete:
        raise ValueError(f"{otlp_endpoint!r} is not the URL of an OTLP receiver; use http://HOST:4317")


def context_from_headers(headers: Headers) -> common_pb2.TraceContext | None:
    """The caller's trace context (W3C traceparent, tracestate), or None if there is none or it is malformed."""
    traceparent = headers.get("traceparent")
    if not traceparent:
        return None
    carrier = {"traceparent": traceparent, "tracestate": headers.get("tracestate") or ""}
    span = trace.get_current_span(_PROPAGATOR.extract(carrier))
    return _to_message(span) if span.get_span_context().is_valid else None


def headers_of(context: common_pb2.TraceContext) -> dict[str, str]:
    """The W3C headers of a trace context; empty for an empty one."""
    headers = {}
    if context.traceparent:
        headers["traceparent"] = context.traceparent
        if context.tracestate:
            headers["tracestate"] = context.tracestate
    return headers


def current_context() -> common_pb2.TraceContext | None:
    """The context of the span that OpenTelemetry calls current in this task, if any."""
    span = trace.get_current_span()
    return _to_message(span) if span.get_span_context().is_valid else None


def _to_message(span: trace.Span) -> common_pb2.TraceContext:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return common_pb2.TraceContext(**carrier)

"""The coordinator's spans of one request: gateway, and below it schedule, prefill and decode."""

from __future__ import annotations

from contextlib import AbstractContextManager

from kvrelay.tracing import Attributes, Span, Tracing
from kvrelay.v1 import common_pb2


class RequestTrace:
    """Keeps the spans of one request; each is ended once, at the latest by `close()`."""

    __slots__ = ("_gateway", "_open", "_tracing")

    def __init__(
        self, tracing: Tracing, parent: common_pb2.TraceContext | None, attributes: Attributes | None = None
    ) -> None:
        self._tracing = tracing
        self._gateway = tracing.start_span("gateway", parent, attributes=attributes)
        self._open: dict[str, Span] = {"gateway": self._gateway}

    def span(self, name: str) -> AbstractContextManager[Span]:
        """A child of the gateway span for a piece of work that ends within one call."""
        return self._tracing.start_span(name, self._gateway.context)

    def begin(self, name: str, attributes: Attributes | None = None) -> common_pb2.TraceContext:
        """Start a child of the gateway span; returns what a worker hangs its own spans below."""
        span = self._open[name] = self._tracing.start_span(name, self._gateway.context, attributes=attributes)
        return span.context

    def end(self, name: str, error: str = "") -> None:
        """End a span that was begun; with `error` it counts as failed. Ignored when it has ended."""
        if span := self._open.pop(name, None):
            if error:
                span.fail(error)
            span.end()

    def close(self, error: str = "") -> None:
        """End everything that is open, innermost first. Idempotent."""
        for name in reversed(list(self._open)):
            self.end(name, error)

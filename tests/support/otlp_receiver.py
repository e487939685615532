"""An OTLP gRPC receiver inside the test process that keeps every span it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSpan:
    """One span; ids in hex, `parent_id` empty for a root."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_unix_ns: int
    end_unix_ns: int
    attributes: dict[str, str | int | float | bool]
    events: dict[str, int]
    error: str | None
    """The status's message, if it is an error."""


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on `endpoint`. Runs in threads of its own, so that a blocked event loop cannot starve it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._spans: list[ReceivedSpan] = []
        self.endpoint = ""

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans so far, in the order of their arrival."""
        with self._changed:
            return list(self._spans)

    def wait_for(self, *names: str, trace_id: str = "", timeout_s: float = 10.0) -> list[ReceivedSpan]:
        """All spans, of one trace if one is named, once there is at least one of each name.

        Raises `TimeoutError` naming the missing ones.
        """

        def chosen() -> list[ReceivedSpan]:
            return [span for span in self._spans if trace_id in ("", span.trace_id)]

        def missing() -> list[str]:
            return [name for name in names if all(span.name != name for span in chosen())]

        with self._changed:
            if not self._changed.wait_for(lambda: not missing(), timeout_s):
                seen = [span.name for span in chosen()]
                raise TimeoutError(f"no span named {missing()} within {timeout_s} s; seen: {seen}")
            return chosen()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._changed:
            self._spans.extend(_spans(request))
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """A receiver on a free port of the loopback interface."""
    receiver = OtlpReceiver()
    with ThreadPoolExecutor(max_workers=2) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
        receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield receiver
        finally:
            server.stop(0).wait()


def assert_one_tree(spans: list[ReceivedSpan]) -> None:
    """Fails unless the spans are one trace in which every parent but the root's was received."""
    assert len({span.trace_id for span in spans}) == 1, f"several traces: {_lines(spans)}"
    ids = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in ids]
    assert len(roots) == 1, f"not one root: {_lines(spans)}"


def _lines(spans: list[ReceivedSpan]) -> str:
    return "".join(f"\n  {s.service} {s.name} trace={s.trace_id} span={s.span_id} parent={s.parent_id}" for s in spans)


def _spans(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield ReceivedSpan(
                    service=str(resource["service.name"]),
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_unix_ns=span.start_time_unix_nano,
                    end_unix_ns=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    events={event.name: event.time_unix_nano for event in span.events},
                    error=span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else None,
                )


def _attributes(pairs: object) -> dict[str, str | int | float | bool]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}  # type: ignore[attr-defined]

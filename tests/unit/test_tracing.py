"""Spans of several processes join into one tree, failures show, and nothing is recorded when tracing is off."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from kvrelay import tracing
from kvrelay.tracing import Tracing, configure_tracing, context_from_headers, headers_of
from kvrelay.v1 import common_pb2
from tests.support.otlp_receiver import OtlpReceiver, assert_one_tree, otlp_receiver

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


def configure(service: str, receiver: OtlpReceiver, **options: float) -> Tracing:
    return configure_tracing(service, receiver.endpoint, set_global=False, **options)  # type: ignore[arg-type]


def test_spans_of_three_processes_are_one_tree(receiver: OtlpReceiver) -> None:
    coordinator, prefill, decode = (configure(name, receiver) for name in ("coordinator", "prefill", "decode"))
    with coordinator.start_span("gateway") as gateway:
        with (
            prefill.start_span("prefill", gateway.context) as computed,
            decode.start_span("kv.receive", computed.context),
        ):
            pass
        with decode.start_span("decode", gateway.context):
            pass
    for process in (coordinator, prefill, decode):
        process.shutdown()
    spans = receiver.wait_for("gateway", "prefill", "kv.receive", "decode")
    assert_one_tree(spans)
    assert {span.name: span.service for span in spans}["kv.receive"] == "decode"


def test_the_trace_of_a_caller_is_continued(receiver: OtlpReceiver) -> None:
    process = configure("coordinator", receiver)
    parent = context_from_headers({"traceparent": PARENT, "tracestate": "a=1"})
    with process.start_span("gateway", parent) as span:
        assert span.context.tracestate == "a=1"
    process.shutdown()
    (received,) = receiver.wait_for("gateway")
    assert (received.trace_id, received.parent_id) == (PARENT[3:35], PARENT[36:52])


def test_a_span_can_be_made_after_the_fact(receiver: OtlpReceiver) -> None:
    process = configure("prefill", receiver)
    span = process.start_span("compute", start_unix_ns=1_000, attributes={"kv.blocks": 3})
    span.event("first_chunk", 1_500)
    span.set({"kv.reused": True})
    span.end(2_000)
    process.shutdown()
    (received,) = receiver.wait_for("compute")
    assert (received.start_unix_ns, received.end_unix_ns, received.events) == (1_000, 2_000, {"first_chunk": 1_500})
    assert received.attributes == {"kv.blocks": 3, "kv.reused": True}


def test_failures_and_cancellations_show(receiver: OtlpReceiver) -> None:
    process = configure("decode", receiver)
    with pytest.raises(RuntimeError), process.start_span("failed"):
        raise RuntimeError("no slot")
    with pytest.raises(asyncio.CancelledError), process.start_span("cancelled"):
        raise asyncio.CancelledError
    process.shutdown()
    errors = {span.name: span.error for span in receiver.wait_for("failed", "cancelled")}
    assert errors == {"failed": "RuntimeError: no slot", "cancelled": "cancelled"}


def test_a_caller_that_does_not_record_is_followed(receiver: OtlpReceiver) -> None:
    process = configure("coordinator", receiver)
    with process.start_span("quiet", common_pb2.TraceContext(traceparent=PARENT[:-2] + "00")):
        pass
    process.start_span("loud").end()
    process.shutdown()
    assert [span.name for span in receiver.wait_for("loud")] == ["loud"]


def test_a_sample_ratio_of_zero_records_only_what_callers_record(receiver: OtlpReceiver) -> None:
    process = configure("coordinator", receiver, sample_ratio=0.0)
    process.start_span("own").end()
    process.start_span("callers", common_pb2.TraceContext(traceparent=PARENT)).end()
    process.shutdown()
    assert [span.name for span in receiver.wait_for("callers")] == ["callers"]


def test_without_an_endpoint_contexts_pass_through_and_nothing_is_recorded() -> None:
    process = configure_tracing("coordinator", None)
    assert not process.enabled
    parent = common_pb2.TraceContext(traceparent=PARENT)
    with process.start_span("gateway", parent) as span:
        assert span.context == parent
        span.set({"a": 1})
        span.event("b")
    with process.start_span("root") as root:
        assert root.context == common_pb2.TraceContext()
    process.shutdown()


def test_without_an_endpoint_the_sdk_is_not_loaded() -> None:
    code = (
        "import sys; from kvrelay.tracing import configure_tracing; configure_tracing('a', None)\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("header", [None, "", "garbage", "00-" + "0" * 32 + "-b7ad6b7169203331-01"])
def test_missing_and_malformed_headers_are_no_context(header: str | None) -> None:
    assert context_from_headers({"traceparent": header} if header is not None else {}) is None


def test_headers_and_contexts_convert_both_ways() -> None:
    headers = {"traceparent": PARENT, "tracestate": "a=1,b=2"}
    context = context_from_headers(headers)
    assert context is not None
    assert headers_of(context) == headers
    assert headers_of(common_pb2.TraceContext()) == {}


def test_no_current_span_is_no_context() -> None:
    assert tracing.current_context() is None


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://host", "ftp://host:1", "http://host:port"])
def test_an_endpoint_must_be_a_url_with_a_port(endpoint: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of an OTLP receiver; use http://HOST:4317"):
        configure_tracing("a", endpoint)


def test_shutdown_is_bounded_when_nobody_listens() -> None:
    with socket.socket() as silent:  # accepts connections in its backlog and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        process = configure_tracing("a", f"http://127.0.0.1:{silent.getsockname()[1]}", set_global=False)
        for _ in range(2000):
            process.start_span("lost").end()
        started = time.monotonic()
        process.shutdown(timeout_s=0.2)
        process.shutdown()
        assert time.monotonic() - started < 1.5

"""Is one request one trace, whatever becomes of it?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.tracing import Tracing, configure_tracing
from kvrelay.v1 import worker_pb2
from tests.support.fake_cluster import fake_cluster
from tests.support.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.support.simulated_cluster import simulated_cluster

PROMPT = list(range(1000, 1100))
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture
def tracing(receiver: OtlpReceiver) -> Iterator[Tracing]:
    tracing = configure_tracing("test", receiver.endpoint, set_global=False)
    yield tracing
    tracing.shutdown()


async def generate(engine: ClusterEngine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, output_kind=RequestOutputKind.DELTA)
    async with contextlib.aclosing(
        engine.generate(tokens_input(PROMPT), params, "traced", trace_headers=CALLER)
    ) as outputs:
        async for _ in outputs:
            pass


async def test_one_request_is_one_tree_below_the_callers_span(
    front_end: FrontEnd, receiver: OtlpReceiver, tracing: Tracing
) -> None:
    async with simulated_cluster(front_end, tracing=tracing) as cluster:
        assert await cluster.engine.is_tracing_enabled()
        await generate(cluster.engine)
        await cluster.wait_idle()
    tracing.shutdown()
    spans = receiver.wait_for("gateway", "schedule", "prefill", "kv.push", "decode")
    assert {span.trace_id for span in spans} == {TRACE_ID}
    by_name = {span.name: span for span in spans}
    assert by_name["gateway"].parent_id == CALLER["traceparent"][36:52]
    for child in ("schedule", "prefill", "decode"):
        assert by_name[child].parent_id == by_name["gateway"].span_id
    assert by_name["kv.push"].parent_id == by_name["prefill"].span_id
    assert by_name["kv.push"].attributes["kv.transport"] == "shm"


async def test_failed_request_ends_its_spans_with_an_error(
    front_end: FrontEnd, receiver: OtlpReceiver, tracing: Tracing
) -> None:
    async with fake_cluster(front_end, tracing=tracing) as cluster:
        generating = asyncio.create_task(generate(cluster.engine))
        (prefill,) = await cluster.prefill.wait_for("prefill")
        cluster.prefill.send_failed(prefill.request_id, worker_pb2.RequestFailed.REASON_INVALID, "top_k is odd")
        with pytest.raises(VLLMValidationError):
            await generating
    tracing.shutdown()
    spans = receiver.wait_for("gateway", "schedule", "prefill")
    by_name = {span.name: span for span in spans}
    assert "top_k is odd" in (by_name["gateway"].error or "")
    assert "top_k is odd" in (by_name["prefill"].error or "")
    assert by_name["schedule"].error is None


async def test_cancelled_request_ends_its_spans(front_end: FrontEnd, receiver: OtlpReceiver, tracing: Tracing) -> None:
    async with fake_cluster(front_end, tracing=tracing) as cluster:
        generating = asyncio.create_task(generate(cluster.engine))
        await cluster.prefill.wait_for("prefill")
        generating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await generating
    tracing.shutdown()
    spans = receiver.wait_for("gateway", "schedule", "prefill")
    assert {span.name: span.error for span in spans} == {
        "gateway": "cancelled",
        "schedule": None,
        "prefill": "cancelled",
    }

"""Requests that workers have no room for wait in the coordinator, in both APIs, and are told when that is too long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from kvrelay.client.connection import client_error
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.inference_service import InferenceService
from kvrelay.errors import OverloadedError
from kvrelay.grpc_options import open_channel
from kvrelay.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.fake_cluster import FakeCluster, until
from tests.support.fake_worker import delta
from tests.support.gateway import GatewayUnderTest, gateway

COMPLETIONS = "/v1/completions"
WAYS: list[dict[str, Any]] = [{}, {"stream": True}, {"stream": True, "echo": False}]
"""The last is a stream that vLLM's serving classes answer."""
LENGTH = common_pb2.FINISH_REASON_LENGTH


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": list(range(1, 11)), "max_tokens": 1, **fields}


@contextlib.asynccontextmanager
async def one_at_a_time(front_end: FrontEnd, **admission: Any) -> AsyncIterator[GatewayUnderTest]:
    """The prefill worker gets its next prompt when it has none."""
    config = ClusterEngineConfig(admission=AdmissionConfig(dispatch_ahead_s=0.0, **admission))
    async with gateway(front_end, config=config) as served:
        yield served


async def answer_prefill(cluster: FakeCluster, number: int) -> str:
    """End the prompt that came as number so many with its only token; returns its id."""
    request = (await cluster.prefill.wait_for("prefill", number))[number - 1]
    cluster.prefill.send(delta(request.request_id, [504], LENGTH, num_cached_tokens=0))
    return str(request.request_id)


@pytest.mark.parametrize("fields", WAYS)
async def test_a_request_waits_until_a_worker_has_room(front_end: FrontEnd, fields: dict[str, Any]) -> None:
    async with one_at_a_time(front_end) as served, asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(served.post(COMPLETIONS, body(**fields)))]
        await served.cluster.prefill.wait_for("prefill")
        answers.append(tasks.create_task(served.post(COMPLETIONS, body(**fields))))
        await until(lambda: served.cluster.engine.num_queued == 1)
        assert len(served.cluster.prefill.messages("prefill")) == 1
        for number in (1, 2):
            await answer_prefill(served.cluster, number)
        assert [(await answer).status_code for answer in answers] == [200, 200]
        served.cluster.assert_idle()


async def test_the_urgent_one_goes_first(front_end: FrontEnd) -> None:
    async with one_at_a_time(front_end) as served, asyncio.TaskGroup() as tasks:
        for number, kind in enumerate(["standard", "batch", "interactive"]):
            headers = {"x-kvrelay-class": kind, "x-request-id": kind}
            tasks.create_task(served.post(COMPLETIONS, body(), **headers))
            if number == 0:
                await served.cluster.prefill.wait_for("prefill")
            await until(lambda num=number: served.cluster.engine.num_queued == num)
        order = [await answer_prefill(served.cluster, number) for number in (1, 2, 3)]
        assert [request_id.split("-")[1] for request_id in order] == ["standard", "interactive", "batch"]


@pytest.mark.parametrize("fields", WAYS)
async def test_who_would_wait_too_long_is_told_when_to_come_back(front_end: FrontEnd, fields: dict[str, Any]) -> None:
    async with one_at_a_time(front_end) as served, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(served.post(COMPLETIONS, body()))
        await served.cluster.prefill.wait_for("prefill")
        second = tasks.create_task(served.post(COMPLETIONS, body()))
        await until(lambda: served.cluster.engine.num_queued == 1)
        refused = await served.post(COMPLETIONS, body(**fields), **{"x-kvrelay-ttft-s": "0.001"})
        assert refused.status_code == 429
        assert "ttft_s allows 0.001 s" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        for number in (1, 2):
            await answer_prefill(served.cluster, number)
        assert [(await first).status_code, (await second).status_code] == [200, 200]
        served.cluster.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_has_waited_too_long_gets_429(front_end: FrontEnd, stream: bool) -> None:
    async with one_at_a_time(front_end) as served, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(served.post(COMPLETIONS, body()))
        await served.cluster.prefill.wait_for("prefill")
        late = await served.post(COMPLETIONS, body(stream=stream), **{"x-kvrelay-ttft-s": "0.02"})
        assert late.status_code == 429
        assert "0.02" in late.json()["error"]["message"]
        await answer_prefill(served.cluster, 1)
        assert (await first).status_code == 200
        assert served.cluster.engine.metrics.num_refused["overloaded"] == 1
        served.cluster.assert_idle()


@pytest.mark.parametrize("fields", WAYS)
async def test_who_leaves_while_waiting_is_forgotten(front_end: FrontEnd, fields: dict[str, Any]) -> None:
    async with one_at_a_time(front_end) as served, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(served.post(COMPLETIONS, body()))
        await served.cluster.prefill.wait_for("prefill")
        second = tasks.create_task(served.post(COMPLETIONS, body(**fields)))
        await until(lambda: served.cluster.engine.num_queued == 1)
        second.cancel()
        await until(lambda: served.cluster.engine.num_queued == 0)
        await answer_prefill(served.cluster, 1)
        assert (await first).status_code == 200
        assert len(served.cluster.prefill.messages("prefill")) == 1
        served.cluster.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["class", "tenant", "ttft-s", "itl-s"])
async def test_nonsense_in_a_header_gets_400(front_end: FrontEnd, name: str, stream: bool) -> None:
    async with gateway(front_end, [504, 2]) as served:
        refused = await served.post(COMPLETIONS, body(stream=stream), **{f"x-kvrelay-{name}": "no sense"})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == f"x-kvrelay-{name}"
        assert "'no sense'" in error["message"]
        assert served.cluster.prefill.received == []


async def test_grpc_tells_when_to_come_back(front_end: FrontEnd) -> None:
    async with one_at_a_time(front_end, max_requests=1) as served, asyncio.TaskGroup() as tasks:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(served.cluster.engine), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        waiting = [tasks.create_task(served.post(COMPLETIONS, body())) for _ in range(2)]
        await until(lambda: served.cluster.engine.num_queued == 1)
        async with open_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            prompt = common_pb2.TokenIds(ids=[1, 2, 3, 4, 5])
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await anext(aiter(stub.Generate(inference_pb2.GenerateRequest(token_ids=prompt))))
            error = client_error(raised.value, "here", None)
            assert isinstance(error, OverloadedError)
            assert error.retry_after_s is not None
            assert error.retry_after_s > 0
            with pytest.raises(grpc.aio.AioRpcError, match="request_class is 'urgent'") as raised:
                await anext(
                    aiter(stub.Generate(inference_pb2.GenerateRequest(token_ids=prompt, request_class="urgent")))
                )
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for number in (1, 2):
            await answer_prefill(served.cluster, number)
        assert [(await answer).status_code for answer in waiting] == [200, 200]
        await server.stop(None)

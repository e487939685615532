"""GET /metrics of a coordinator: does it tell what has become of requests, on every way that they take?"""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.v1 import common_pb2, worker_pb2
from tests.support.fake_cluster import until
from tests.support.fake_worker import FakeWorker, Responder, delta
from tests.support.gateway import GatewayUnderTest, gateway

PROMPT = list(range(500, 540))
TOKENS = [510, 511, 512, 513]


async def scrape(served: GatewayUnderTest) -> dict[str, float]:
    """`name` or `name{value,...}` -> figure; the name is without kvrelay_, the values are those of labels but ours."""
    response = await served.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(value for name, value in sample.labels.items() if name != "coordinator")
            found[sample.name.removeprefix("kvrelay_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def outcomes(found: dict[str, float]) -> dict[str, float]:
    names = {name: f"requests_total{{{name}}}" for name in ("ok", "failed", "cancelled", "refused")}
    return {name: found[sample] for name, sample in names.items() if found[sample]}


def decisions(found: dict[str, float], kind: str) -> float:
    """Of all policies."""
    return sum(value for name, value in found.items() if name.startswith(f"decisions_total{{{kind},"))


def says(*deltas: dict[str, Any]) -> Responder:
    """A worker that answers a request with one message for each of these."""

    def respond(worker: FakeWorker, message: worker_pb2.CoordinatorMessage) -> None:
        if message.WhichOneof("message") in ("prefill", "decode"):
            for each in deltas:
                worker.send(delta(getattr(message, message.WhichOneof("message")).request_id, **each))

    return respond


async def complete(served: GatewayUnderTest, **fields: Any) -> int:
    response = await served.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, **fields})
    return response.status_code


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_request_counts_with_its_times_and_tokens(front_end: FrontEnd, stream: bool) -> None:
    async with gateway(front_end, TOKENS) as served:
        assert await complete(served, stream=stream) == 200
        found = await scrape(served)
        assert outcomes(found) == {"ok": 1}
        assert (found["prompt_tokens_total"], found["generated_tokens_total"]) == (40, 4)
        assert decisions(found, "split") == 1
        assert [found[f"{name}_seconds_count"] for name in ("ttft", "itl", "e2e", "schedule")] == [1, 3, 1, 1]
        assert 0 < found["schedule_seconds_sum"] < found["ttft_seconds_sum"] <= found["e2e_seconds_sum"]
        assert found["in_flight_requests"] == 0
        assert found["process_cpu_seconds_total"] > 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_stop_string_is_a_good_end(front_end: FrontEnd, stream: bool) -> None:
    async with gateway(front_end, TOKENS, with_prefill=False) as served:
        text = (await served.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})).json()["choices"][0]["text"]
        assert await complete(served, stream=stream, stop=text[:3]) == 200
        found = await scrape(served)
        assert outcomes(found) == {"ok": 2}
        assert decisions(found, "local") == 2


async def test_failures_cancellations_and_what_is_in_flight(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served:
        decode = served.cluster.decode
        decode.respond = says({"token_ids": [504]})
        body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
        async with served.http.stream("POST", "/v1/completions", json=body) as response:
            decode.send_status(num_running_requests=5, engine_kv_usage=0.5)
            await until(lambda: served.cluster.pool.reports()[0].status.num_running_requests == 5)
            found = await scrape(served)
            assert (found["in_flight_requests"], found["worker_running_requests{d1}"]) == (1, 5)
            assert found["worker_engine_kv_usage_ratio{d1}"] == 0.5
            (request,) = decode.messages("decode")
            decode.send_failed(request.request_id, worker_pb2.RequestFailed.REASON_INTERNAL, "the engine is ill")
            assert '"code":500' in "".join([line async for line in response.aiter_lines()])
        async with served.http.stream("POST", "/v1/completions", json=body):
            pass
        await until(lambda: served.cluster.engine.num_requests == 0)
        assert outcomes(await scrape(served)) == {"failed": 1, "cancelled": 1}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_refusals_tell_why(front_end: FrontEnd, stream: bool) -> None:
    async with gateway(front_end, TOKENS, config=ClusterEngineConfig(max_requests=0)) as served:
        assert await complete(served, stream=stream) == 429
        found = await scrape(served)
        assert outcomes(found) == {"refused": 1}
        assert found["refused_requests_total{overloaded}"] == 1


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("fields", [{}, {"logit_bias": {"7": 1}}], ids=["plain", "other"])
async def test_cached_tokens_are_those_that_the_first_worker_found(
    front_end: FrontEnd, path: str, fields: dict[str, Any]
) -> None:
    length = common_pb2.FINISH_REASON_LENGTH
    async with gateway(front_end) as served:
        served.cluster.prefill.respond = says({"token_ids": [504], "finish": length, "num_cached_tokens": 16})
        served.cluster.decode.respond = says({"token_ids": [505], "finish": length, "num_cached_tokens": 32})
        prompt = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": PROMPT}
        body = {**prompt, **fields, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
        text = (await served.post(f"/v1/{path}", body)).text
        assert '"prompt_tokens_details":{"cached_tokens":16' in text
        assert (await scrape(served))["cached_tokens_total"] == 16

"""Every decision can be explained: over gRPC, on the command line, and in a header of the answer."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httpx
import pytest

from kvrelay.client.explain import NotExplainedError, explain
from kvrelay.coordinator.config import CoordinatorConfig
from kvrelay.coordinator.front_end import FrontEnd, FrontEndConfig
from kvrelay.coordinator.main import running
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.etcd.server import run_etcd
from kvrelay.membership import register, worker_key
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2
from tests.support.fake_worker import MODEL, FakeWorker, ScriptedModel
from tests.support.gateway import gateway

COMPLETIONS = "/v1/completions"
PROMPT = list(range(1, 20))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_tells_why_when_asked(front_end: FrontEnd, stream: bool) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "stream": stream}
    async with gateway(front_end, [7, 8, 9]) as served:
        answer = await served.post(COMPLETIONS, body, **{"x-kvrelay-explain": "1", "x-request-id": "mine"})
        plain = await served.post(COMPLETIONS, body)
    assert answer.status_code == 200
    assert "x-kvrelay-decision" not in plain.headers
    decision = json.loads(answer.headers["x-kvrelay-decision"])
    assert decision["request_id"] == "cmpl-mine-0"
    assert (decision["prefill_worker_id"], decision["decode_worker_id"]) == ("p1", "d1")
    assert decision["num_prompt_tokens"] == len(PROMPT)
    assert "p1 computes 19 of 19 tokens" in decision["reason"]
    assert decision["candidates"][0]["decode_worker_id"] == "d1"


async def test_a_refused_request_was_decided_nowhere(front_end: FrontEnd) -> None:
    async with gateway(front_end, [7]) as served:
        refused = await served.post(COMPLETIONS, {"model": MODEL, "prompt": []}, **{"x-kvrelay-explain": "1"})
    assert refused.status_code == 400
    assert "x-kvrelay-decision" not in refused.headers


async def test_the_command_finds_the_coordinator_that_planned_it(model_folder: Path) -> None:
    decode = FakeWorker("d1", cluster_pb2.ROLE_DECODE, ScriptedModel([1000, 1001, 1002]).decode)
    await decode.start()
    async with run_etcd() as etcd:
        endpoint = etcd.endpoint
        config = CoordinatorConfig(
            coordinator_id="c1",
            etcd=[endpoint],
            http_listen="127.0.0.1:0",
            grpc_listen="127.0.0.1:0",
            front_end=FrontEndConfig(model=str(model_folder), served_model_name=MODEL),
            drain_s=1.0,
        )
        async with (
            connect(EtcdConfig(endpoints=[endpoint])) as client,
            register(client, worker_key("default", "d1"), decode.info),
            running(config, Tracing()) as info,
            httpx.AsyncClient(base_url=info.http_url) as http,
        ):
            await _check_explained(endpoint, http)
    await decode.stop()


async def _check_explained(endpoint: str, http: httpx.AsyncClient) -> None:
    while (await http.get("/ready")).status_code != 200:
        pass
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
    answer = (await http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})).json()
    for known_as in ("mine", answer["id"]):
        coordinator, decision = await explain([endpoint], "default", known_as)
        assert coordinator.coordinator_id == "c1"
        assert decision.decode_worker_id == "d1"
        assert decision.num_prompt_tokens == len(PROMPT)
    with pytest.raises(NotExplainedError, match="none of 1 coordinators has planned request 'other'"):
        await explain([endpoint], "default", "other")
    with pytest.raises(NotExplainedError, match="no coordinator of cluster 'nowhere'"):
        await explain([endpoint], "nowhere", "mine")
    command = [sys.executable, "-m", "kvrelay.cli", "explain", "mine", "--etcd", endpoint]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    shown = output.decode()
    assert "by c1, policy" in shown
    assert "d1" in shown

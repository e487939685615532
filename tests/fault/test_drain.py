"""A worker that is told to stop lets requests end that will come to it, and then leaves. Engines are simulated."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.cluster_gauges import ClusterGauges, open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.processes import gone

pytestmark = pytest.mark.timeout(120)

PROMPT_TOKENS = 400
PREFILL_TOKENS_PER_S = 300
"""A prompt takes more than a second: less than a worker drains, and more than it takes to leave."""
SLOW = ("--prefill-tokens-per-s", str(PREFILL_TOKENS_PER_S), "--max-batched-tokens", "64")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    with live_cluster(tmp_path_factory.mktemp("up"), "--engine", "simulated", engine_options=SLOW) as cluster:
        yield cluster


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_request_in_prefill_outlives_the_order_to_stop(cluster: LiveCluster, role: str) -> None:
    worker = cluster.process_of(f"{role}-worker")
    body = {"model": cluster.state.model, "prompt": [7] * PROMPT_TOKENS, "max_tokens": 4, "cache_salt": role}
    async with (
        open_gauges(cluster.state) as gauges,
        httpx.AsyncClient(base_url=cluster.state.http_url) as http,
        asyncio.TaskGroup() as tasks,
    ):
        asking = tasks.create_task(http.post("/v1/completions", json=body, timeout=30))
        await _prefill_runs(gauges)
        worker.send_signal(signal.SIGTERM)
        answer = await asking
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert gone([worker.pid])
    await _answers(cluster)


async def test_an_idle_worker_leaves_at_once(cluster: LiveCluster) -> None:
    worker = cluster.process_of("decode-worker")
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert gone([worker.pid])
    assert time.monotonic() - began < 2.0
    await _answers(cluster)


async def _prefill_runs(gauges: ClusterGauges) -> None:
    async with asyncio.timeout(10):
        while not (await gauges.read())["prefill-0"].num_running_requests:
            continue


async def _answers(cluster: LiveCluster) -> None:
    """Until the worker that left has its successor."""
    body = {"model": cluster.state.model, "prompt": [9], "max_tokens": 1}
    async with asyncio.timeout(60), httpx.AsyncClient(base_url=cluster.state.http_url) as http:
        while True:
            if await _num_workers(cluster) == 2 and (await http.post("/v1/completions", json=body)).status_code == 200:
                return


async def _num_workers(cluster: LiveCluster) -> int:
    async with open_gauges(cluster.state) as gauges:
        return len(await gauges.read())

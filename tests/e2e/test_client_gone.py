"""A client that goes away costs nothing more than the engine step that is running."""

from __future__ import annotations

import time

import httpx
import pytest

from kvrelay.client import AsyncClient
from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

LONG_PROMPT = list(range(5000, 6200))
WITHIN_S = 1.0


@pytest.fixture(scope="module")
def step_s(default_cluster: LiveCluster) -> float:
    """Of an engine step that computes the long prompt and cannot be broken off, in seconds; the first one warms up."""
    url = f"{default_cluster.state.http_url}/v1/completions"
    for shift in (50, 60):
        body = {"prompt": [token + shift for token in LONG_PROMPT], "max_tokens": 1}
        started = time.perf_counter()
        httpx.post(url, json={"model": default_cluster.state.model, **body}, timeout=120).raise_for_status()
        took = time.perf_counter() - started
    return took


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
async def test_cancelling_the_call_frees_both_workers_after_the_running_step(
    default_cluster: LiveCluster, step_s: float, num_chunks: int
) -> None:
    async with AsyncClient(default_cluster.state.grpc_address) as client, open_gauges(default_cluster.state) as gauges:
        prompt = [token + num_chunks for token in LONG_PROMPT]
        async with client.stream(prompt, max_tokens=500, temperature=0, ignore_eos=True) as stream:
            for _ in range(num_chunks):
                await anext(stream)
            await gauges.wait_busy()
        await gauges.wait_idle(timeout_s=WITHIN_S + step_s)


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_the_connection_frees_both_workers_after_the_running_step(
    default_cluster: LiveCluster, step_s: float, stream: bool
) -> None:
    url = f"{default_cluster.state.http_url}/v1/completions"
    prompt = [token + 100 + stream for token in LONG_PROMPT]
    body = {"prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": stream}
    async with open_gauges(default_cluster.state) as gauges:
        with pytest.raises(httpx.ReadTimeout):
            async with httpx.AsyncClient(timeout=httpx.Timeout(30, read=0.3)) as http:
                await http.post(url, json={"model": default_cluster.state.model, **body})
        await gauges.wait_idle(timeout_s=WITHIN_S + step_s)

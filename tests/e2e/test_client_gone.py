"""A client that goes away costs nothing more than the engine step that is running."""

from __future__ import annotations

import httpx
import pytest

from kvrelay.client import AsyncClient
from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

LONG_PROMPT = list(range(5000, 6200))


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
async def test_cancelling_the_call_frees_both_workers_within_a_second(
    default_cluster: LiveCluster, num_chunks: int
) -> None:
    async with AsyncClient(default_cluster.state.grpc_address) as client, open_gauges(default_cluster.state) as gauges:
        prompt = [token + num_chunks for token in LONG_PROMPT]
        async with client.stream(prompt, max_tokens=500, temperature=0, ignore_eos=True) as stream:
            for _ in range(num_chunks):
                await anext(stream)
            await gauges.wait_busy()
        await gauges.wait_idle(timeout_s=1.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_the_connection_frees_both_workers_within_a_second(
    default_cluster: LiveCluster, stream: bool
) -> None:
    url = f"{default_cluster.state.http_url}/v1/completions"
    prompt = [token + 100 + stream for token in LONG_PROMPT]
    body = {"prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": stream}
    async with open_gauges(default_cluster.state) as gauges:
        with pytest.raises(httpx.ReadTimeout):
            async with httpx.AsyncClient(timeout=httpx.Timeout(30, read=0.3)) as http:
                await http.post(url, json={"model": default_cluster.state.model, **body})
        await gauges.wait_idle(timeout_s=1.0)

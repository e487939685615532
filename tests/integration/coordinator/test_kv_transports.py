"""Whichever way blocks go, the tokens are the same, and the worker tells which way it was."""

from __future__ import annotations

import asyncio

import pytest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.kv_transfer.transport import KvTransport
from tests.support.fake_cluster import Generated
from tests.support.simulated_cluster import SimulatedCluster, simulated_cluster


async def _generate(cluster: SimulatedCluster, first_token: int) -> tuple[int, ...]:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, temperature=0.0, max_tokens=8)
    prompt = tokens_input(list(range(first_token, first_token + 200)))
    generated = Generated()
    async with asyncio.timeout(30):
        async for output in cluster.engine.generate(prompt, params, f"r{first_token}"):
            generated.add(output)
    return tuple(generated.token_ids[0])


@pytest.mark.parametrize(
    ("transport", "second"),
    [
        (KvTransport.AUTO, "shm"),
        (KvTransport.GRPC, "grpc"),
        (KvTransport.COLLECTIVE, "gloo"),
    ],
)
async def test_tokens_are_the_same_over_every_transport(
    front_end: FrontEnd, transport: KvTransport, second: str
) -> None:
    async with simulated_cluster(front_end, transport=KvTransport.GRPC) as cluster:
        expected = [await _generate(cluster, first) for first in (1000, 2000)]
    async with simulated_cluster(front_end, transport=transport) as cluster:
        host = cluster.workers[0].host
        got = [await _generate(cluster, 1000)]
        if transport is KvTransport.COLLECTIVE:  # The first blocks go by gRPC while the group is made.
            async with asyncio.timeout(10):
                while not all(peer.collecting.is_ready for peer in host.peers._peers.values()):
                    await asyncio.sleep(0.01)
        before = host.counters[f"bytes_pushed_{second}"]
        got.append(await _generate(cluster, 2000))
        assert got == expected
        assert host.counters[f"bytes_pushed_{second}"] > before
        assert host.counters["collective_fallbacks"] == 0
        await cluster.wait_idle()

"""A worker is killed in the middle of a stream, and its client sees a pause."""

from __future__ import annotations

import pytest

from kvrelay.client import AsyncClient
from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

PROMPT = list(range(7000, 7300))
NUM_TOKENS = 64


async def test_a_stream_outlives_the_only_decode_worker(float32_cluster: LiveCluster) -> None:
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    async with AsyncClient(float32_cluster.state.grpc_address) as client:
        undisturbed = await client.generate(PROMPT, **sampling)
        victim = float32_cluster.process_of("decode-worker")
        tokens: list[int] = []
        async with client.stream(PROMPT, **sampling) as stream:
            async for chunk in stream:
                tokens.extend(chunk.token_ids)
                if len(tokens) >= NUM_TOKENS // 4 and victim.is_running():
                    victim.kill()
    assert not victim.is_running()
    assert tokens == list(undisturbed.completions[0].token_ids)

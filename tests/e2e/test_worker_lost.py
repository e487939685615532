"""A worker is killed in the middle of streams, and their clients see a pause. What samplers know goes on as well."""

from __future__ import annotations

import pytest

from kvrelay.client import AsyncClient
from tests.support.live_cluster import LiveCluster
from tests.support.sampler_cases import all_at_once, one_by_one, tokens_and_texts

pytestmark = pytest.mark.timeout(600)

NUM_TOKENS = 48
KILLED_AFTER = 12
"""Tokens that every stream has got."""


async def test_streams_outlive_the_only_decode_worker(float32_cluster: LiveCluster) -> None:
    victim = float32_cluster.process_of("decode-worker")
    async with AsyncClient(float32_cluster.state.grpc_address) as client:
        wanted = await one_by_one(client, NUM_TOKENS)
        async with all_at_once(client, NUM_TOKENS, begun=KILLED_AFTER) as streams:
            assert not any(stream.done() for stream in streams.values())
            victim.kill()
            got = {name: await stream for name, stream in streams.items()}
        assert not victim.is_running()
    assert tokens_and_texts(got) == tokens_and_texts(wanted)
    assert all(len(each.logprobs) == len(each.token_ids) for each in got["logprobs"].completions)

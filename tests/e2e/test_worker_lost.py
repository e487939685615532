"""A worker is killed in the middle of streams, and their clients see a pause. What samplers know goes on as well."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psutil
import pytest

from kvrelay.client import AsyncClient
from kvrelay.client.options import GenerateOptions
from kvrelay.client.results import Collector, Completion
from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

NUM_TOKENS = 48
KILLED_AFTER = 12
"""Tokens that every stream has got."""
SEEDED: GenerateOptions = {"temperature": 1.0, "seed": 11}
GREEDY: GenerateOptions = {"temperature": 0.0}
OPTIONS: dict[str, GenerateOptions] = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "seeded-top": {**SEEDED, "top_p": 0.9, "top_k": 50, "n": 2},
    "penalties": {**GREEDY, "presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    "bad-words": {**GREEDY, "bad_words": [" the", " a", " of"]},
    "regex": {**SEEDED, "regex": r"([a-z]{3,8} [0-9]{2}, ){30}", "presence_penalty": 0.5},
    "min-tokens": {**GREEDY, "min_tokens": 30},
    "logprobs": {**GREEDY, "logprobs": 2},
}
PROMPT = "Tell me about the lighthouse on the coast, its keeper and the ships that passed in the storm. " * 6


async def generate(client: AsyncClient, options: GenerateOptions, has_some: asyncio.Event) -> Sequence[Completion]:
    collector = Collector()
    async for chunk in client.stream(PROMPT, max_tokens=NUM_TOKENS, **options):
        collector.add(chunk)
        if len(collector.token_ids) == options.get("n", 1) and all(
            len(tokens) >= KILLED_AFTER for tokens in collector.token_ids.values()
        ):
            has_some.set()
    has_some.set()
    return collector.result().completions


async def test_streams_outlive_the_only_decode_worker(float32_cluster: LiveCluster) -> None:
    victim: psutil.Process = float32_cluster.process_of("decode-worker")
    async with AsyncClient(float32_cluster.state.grpc_address) as client:
        wanted = {name: await generate(client, options, asyncio.Event()) for name, options in OPTIONS.items()}
        begun = {name: asyncio.Event() for name in OPTIONS}
        async with asyncio.TaskGroup() as tasks:
            streams = {
                name: tasks.create_task(generate(client, options, begun[name]), name=name)
                for name, options in OPTIONS.items()
            }
            for event in begun.values():
                await event.wait()
            assert not any(stream.done() for stream in streams.values())
            victim.kill()
        assert not victim.is_running()
    got = {name: stream.result() for name, stream in streams.items()}
    assert {name: [each.token_ids for each in found] for name, found in got.items()} == {
        name: [each.token_ids for each in found] for name, found in wanted.items()
    }
    assert {name: [each.text for each in found] for name, found in got.items()} == {
        name: [each.text for each in found] for name, found in wanted.items()
    }
    assert all(len(each.logprobs) == len(each.token_ids) for each in got["logprobs"])

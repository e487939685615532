"""Many requests at once, some of them cancelled: the rest is right, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from tests.support.cluster_gauges import ClusterGauges, open_gauges
from tests.support.equality_cases import length_cases
from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

ROUNDS, REQUESTS, AT_ONCE = 3, 200, 16
GROWTH_BYTES = 32 << 20


@pytest_asyncio.fixture
async def client(float32_cluster: LiveCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(float32_cluster.state.grpc_address) as client:
        yield client


@pytest_asyncio.fixture
async def gauges(float32_cluster: LiveCluster) -> AsyncIterator[ClusterGauges]:
    async with open_gauges(float32_cluster.state) as gauges:
        yield gauges


class Load:
    """Requests of mixed lengths with known answers; every fifth is cancelled after a random number of chunks."""

    def __init__(self, client: AsyncClient, reference: dict[str, Any], seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)
        names = [case.name for case in length_cases() if isinstance(case.prompt, str) and (case.num_tokens or 0) < 600]
        self._answers = [reference[name] for name in names]
        self.wrong: list[str] = []

    async def run(self) -> None:
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with slots:
                await (self._cancelled() if number % 5 == 0 else self._checked())

        async with asyncio.TaskGroup() as tasks:
            for number in range(REQUESTS):
                tasks.create_task(one(number))

    async def _checked(self) -> None:
        answer = self._random.choice(self._answers)
        num_tokens = self._random.randint(1, 8)
        options = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        result = await self._client.generate(answer["prompt_token_ids"], **options)
        expected = answer["completions"][0]["token_ids"][:num_tokens]
        if list(result.token_ids) != expected:
            self.wrong.append(f"{len(answer['prompt_token_ids'])} tokens: {result.token_ids} instead of {expected}")

    async def _cancelled(self) -> None:
        prompt = [self._random.randrange(1000, 40000) for _ in range(self._random.randrange(1, 400))]
        limit = self._random.choice([0, 0, 1, 2, 5])
        stream = self._client.stream(prompt, max_tokens=200, temperature=0, ignore_eos=True)
        async with stream:
            for _ in range(limit):
                await anext(stream, None)


async def test_two_hundred_requests_with_cancellations_leave_nothing(
    float32_cluster: LiveCluster, client: AsyncClient, gauges: ClusterGauges, reference: dict[str, Any]
) -> None:
    memory: list[dict[str, int]] = []
    for round_number in range(ROUNDS):
        load = Load(client, reference, seed=round_number)
        await load.run()
        assert load.wrong == []
        await gauges.wait_idle(timeout_s=5)
        memory.append(_private_bytes(float32_cluster))

    # The first round fills caches and pools; afterwards memory stays.
    assert all(memory[-1][name] - memory[0][name] < GROWTH_BYTES for name in memory[0]), memory


def _private_bytes(cluster: LiveCluster) -> dict[str, int]:
    """Memory that our processes have for themselves; vLLM's grow as long as their KV pages are touched first."""
    commands = ("coordinator", "prefill-worker", "decode-worker")
    return {command: cluster.process_of(command).memory_full_info().uss for command in commands}

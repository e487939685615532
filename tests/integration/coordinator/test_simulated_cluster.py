"""Does the path over two workers give what one worker gives, and is nothing left of it?"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.front_end import FrontEnd
from tests.support.fake_cluster import Generated
from tests.support.simulated_cluster import DECODE, PREFILL, simulated_cluster


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 10_000 + length).choices(range(1000, 40_000), k=length)


async def generate(engine: ClusterEngine, prompt: list[int], request_id: str = "r", **sampling: Any) -> Generated:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, **({"temperature": 0.0} | sampling))
    generated = Generated()
    async with asyncio.timeout(30):
        async for output in engine.generate(tokens_input(prompt), params, request_id):
            generated.add(output)
    return generated


SAMPLINGS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 1},
    {"max_tokens": 12, "presence_penalty": 0.5},
    {"max_tokens": 12, "temperature": 1.0, "seed": 7},
    {"max_tokens": 12, "temperature": 1.0, "seed": 7, "n": 3},
    {"max_tokens": 6, "logprobs": 2},
    {"max_tokens": 6, "prompt_logprobs": 1},
    {"max_tokens": 6, "prompt_logprobs": 1, "min_tokens": 2},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 700])
async def test_two_workers_give_what_one_gives(front_end: FrontEnd, length: int, sampling: dict[str, Any]) -> None:
    prompt = prompt_of(length)
    async with simulated_cluster(front_end, [DECODE]) as alone:
        expected = await generate(alone.engine, prompt, **sampling)
    async with simulated_cluster(front_end) as cluster:
        got = await generate(cluster.engine, prompt, **sampling)
        assert got.token_ids == expected.token_ids
        assert got.text == expected.text
        assert got.finish_reason == expected.finish_reason
        assert got.logprobs == expected.logprobs
        assert got.prompt_logprobs == expected.prompt_logprobs
        await cluster.wait_idle()


async def test_decode_loads_the_blocks_that_prefill_computed(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end) as cluster:
        await generate(cluster.engine, prompt_of(160), "counted", max_tokens=4)
        timeline = cluster.engine.timeline("counted")
        assert timeline is not None
        assert timeline.counters["decode.blocks_loaded"] == 10


async def test_second_turn_finds_what_the_first_left(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end) as cluster:
        first = await generate(cluster.engine, prompt_of(160), max_tokens=4)
        prompt = [*prompt_of(160), *first.token_ids[0], *prompt_of(40, seed=1)]
        second = await generate(cluster.engine, prompt, max_tokens=4)
        assert second.outputs[-1].num_cached_tokens >= 160


async def test_many_requests_with_cancellations_leave_nothing(front_end: FrontEnd) -> None:
    chance = random.Random(5)
    lengths = [chance.choice([3, 16, 40, 200, 900]) for _ in range(80)]
    async with simulated_cluster(front_end, [DECODE]) as alone:
        expected = [await generate(alone.engine, prompt_of(length), max_tokens=8) for length in lengths]
    gate = asyncio.Semaphore(16)
    async with simulated_cluster(front_end, [PREFILL, PREFILL, DECODE, DECODE]) as cluster:

        async def one(index: int) -> Generated | None:
            async with gate:
                task = asyncio.create_task(
                    generate(cluster.engine, prompt_of(lengths[index]), f"r{index}", max_tokens=8)
                )
                if index % 5:
                    return await task
                await asyncio.wait([task], timeout=chance.random() * 0.05)
                task.cancel()
                await asyncio.wait([task])
                return None

        got = await asyncio.gather(*(one(index) for index in range(len(lengths))))
        for result, wanted in zip(got, expected, strict=True):
            assert result is None or result.token_ids == wanted.token_ids
        await cluster.wait_idle()
        assert cluster.engine.num_requests == 0
        used = [worker.host.counters["requests"] for worker in cluster.workers]
        assert min(used) > 0

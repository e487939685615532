"""Workers are lost in the middle of requests: does every client get what one engine gives, and no token twice?"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.engine.simulated_model import SimulatedConfig
from tests.support.fake_cluster import Generated, until
from tests.support.simulated_cluster import DECODE, PREFILL, SimulatedCluster, simulated_cluster

ROLES = [PREFILL, PREFILL, DECODE, DECODE, DECODE]
QUICK = SimulatedConfig(time_scale=0.05)
SLOW = SimulatedConfig(time_scale=0.5, prefill_tokens_per_s=2000, max_batched_tokens=128)
NUM_TOKENS = 24
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"temperature": 1.0, "n": 3},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"min_tokens": 16},
    {"presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.0, "seed": 7, "n": 3},
    {"bad_words": ["lamp"]},
]


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(1000, 40_000), k=length)


class Answer:
    """A request under way."""

    def __init__(self, cluster: SimulatedCluster, length: int, **sampling: Any) -> None:
        self.got = Generated()
        self._cluster = cluster
        self._prompt = prompt_of(length)
        self._params = SamplingParams(
            output_kind=RequestOutputKind.DELTA, **({"temperature": 0.0, "max_tokens": NUM_TOKENS} | sampling)
        )
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for output in self._cluster.engine.generate(tokens_input(self._prompt), self._params, "r"):
            self.got.add(output)

    @property
    def num_tokens(self) -> int:
        """Of the completion that has most."""
        return max(map(len, self.got.token_ids.values()), default=0)

    def worker(self, role: str) -> Any:
        """Who has it by its latest plan."""
        decision = self._cluster.engine.decision("r")
        assert decision is not None
        return self._cluster.worker(getattr(decision, f"{role}_worker_id"))

    async def end(self) -> Generated:
        async with asyncio.timeout(30):
            await self._task
        return self.got


async def expected(front_end: FrontEnd, length: int, **sampling: Any) -> Generated:
    async with simulated_cluster(front_end, [DECODE], config=QUICK) as alone:
        return await Answer(alone, length, **sampling).end()


def assert_same(got: Generated, wanted: Generated) -> None:
    assert got.token_ids == wanted.token_ids
    assert got.text == wanted.text
    assert got.finish_reason == wanted.finish_reason
    assert got.logprobs == wanted.logprobs
    assert got.prompt_logprobs == wanted.prompt_logprobs


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("length", [5, 16, 100])
@pytest.mark.parametrize("num_tokens", [0, 1, 10])
async def test_a_lost_decode_worker_costs_no_token(
    front_end: FrontEnd, length: int, num_tokens: int, sampling: dict[str, Any]
) -> None:
    wanted = await expected(front_end, length, **sampling)
    async with simulated_cluster(front_end, ROLES, config=SLOW) as cluster:
        answer = Answer(cluster, length, **sampling)
        await until(lambda: cluster.engine.decision("r") and answer.num_tokens >= num_tokens)
        await answer.worker("decode").lose()
        assert_same(await answer.end(), wanted)
        assert cluster.engine.metrics.num_replanned == 1
        await cluster.wait_idle()
        assert cluster.engine.num_requests == 0


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
async def test_a_request_may_lose_two_workers(front_end: FrontEnd, sampling: dict[str, Any]) -> None:
    wanted = await expected(front_end, 100, **sampling)
    async with simulated_cluster(front_end, ROLES, config=SLOW) as cluster:
        answer = Answer(cluster, 100, **sampling)
        for num_tokens in (6, 12):
            await until(lambda num_tokens=num_tokens: answer.num_tokens >= num_tokens)
            await answer.worker("decode").lose()
        assert_same(await answer.end(), wanted)
        assert cluster.engine.metrics.num_replanned == 2
        await cluster.wait_idle()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
async def test_a_prefill_worker_that_is_lost_before_its_token_is_replaced(
    front_end: FrontEnd, sampling: dict[str, Any]
) -> None:
    wanted = await expected(front_end, 900, **sampling)
    async with simulated_cluster(front_end, ROLES, config=SLOW) as cluster:
        answer = Answer(cluster, 900, **sampling)
        await until(lambda: cluster.engine.decision("r"))
        lost, decode = answer.worker("prefill"), answer.worker("decode")
        await until(lambda: len(decode.host.store.hashes) >= 16)
        await lost.lose()
        assert_same(await answer.end(), wanted)
        other = answer.worker("prefill")
        assert other is not lost
        assert other.host.counters["requests"] == 1
        await cluster.wait_idle()


async def test_only_what_is_missing_is_computed_again(front_end: FrontEnd) -> None:
    """The prompt is where it was computed, and what was generated is a few tokens."""
    async with simulated_cluster(front_end, ROLES, config=SLOW, policy="cost") as cluster:
        answer = Answer(cluster, 640)
        await until(lambda: answer.num_tokens >= 10)
        await answer.worker("decode").lose()
        await answer.end()
        assert sum(worker.host.counters["blocks_saved"] for worker in cluster.workers[:2]) <= 640 // 16 + 2
        timeline = cluster.engine.timeline("r")
        assert timeline is not None
        assert timeline.counters["decode.tokens_stored"] >= 640

"""A worker drains that has requests of longer: do they go on elsewhere before it leaves, and is nothing lost?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.engine.simulated_model import SimulatedConfig, expected_tokens
from kvrelay.v1 import cluster_pb2
from tests.support.fake_cluster import Generated, until
from tests.support.simulated_cluster import DECODE, PREFILL, SimulatedCluster, SimulatedWorker, simulated_cluster

SLOW = SimulatedConfig(time_scale=0.5, prefill_tokens_per_s=2000, max_batched_tokens=128)
PROMPT = list(range(1000, 1100))


async def ask(cluster: SimulatedCluster, request_id: str, num_tokens: int, **sampling: Any) -> Generated:
    got = Generated()
    params = SamplingParams(
        output_kind=RequestOutputKind.DELTA, temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **sampling
    )
    async with asyncio.timeout(30):
        async for output in cluster.engine.generate(tokens_input(PROMPT), params, request_id):
            got.add(output)
    return got


def drain(cluster: SimulatedCluster, worker: SimulatedWorker, drain_s: float) -> None:
    record = cluster_pb2.WorkerInfo()
    record.CopyFrom(worker.info)
    record.state = cluster_pb2.WORKER_STATE_DRAINING
    record.drain_s = drain_s
    cluster.pool.update(record)


def chosen(cluster: SimulatedCluster, request_id: str, role: str) -> SimulatedWorker:
    decision = cluster.engine.decision(request_id)
    assert decision is not None
    return cluster.worker(getattr(decision, f"{role}_worker_id"))


@pytest.mark.parametrize("num_tokens", [0, 10])
async def test_a_stream_goes_on_elsewhere_before_its_decode_worker_leaves(front_end: FrontEnd, num_tokens: int) -> None:
    async with simulated_cluster(front_end, [PREFILL, DECODE, DECODE], config=SLOW) as cluster:
        asking = asyncio.create_task(ask(cluster, "r", 200))
        await until(lambda: cluster.engine.decision("r") and cluster.engine.metrics.num_generated_tokens >= num_tokens)
        leaver = chosen(cluster, "r", "decode")
        drain(cluster, leaver, 0.2)
        await until(lambda: len(cluster.pool.workers()) == 2)
        assert leaver.host.jobs.total() == 0 or not asking.done()
        assert (await asking).token_ids[0] == expected_tokens(PROMPT, 200, SLOW)
        assert chosen(cluster, "r", "decode") is not leaver
        assert cluster.engine.metrics.num_replanned == 1
        await cluster.wait_idle()


async def test_what_is_done_in_time_stays(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, [PREFILL, DECODE, DECODE], config=SLOW) as cluster:
        asking = asyncio.create_task(ask(cluster, "r", 20))
        await until(lambda: cluster.engine.metrics.num_generated_tokens)
        drain(cluster, chosen(cluster, "r", "decode"), 30.0)
        assert (await asking).token_ids[0] == expected_tokens(PROMPT, 20, SLOW)
        assert cluster.engine.metrics.num_replanned == 0
        await until(lambda: len(cluster.pool.workers()) == 2)
        await cluster.wait_idle()


async def test_a_prompt_goes_to_another_prefill_worker(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, [PREFILL, PREFILL, DECODE], config=SLOW) as cluster:
        asking = asyncio.create_task(ask(cluster, "r", 5))
        await until(lambda: cluster.engine.decision("r"))
        leaver = chosen(cluster, "r", "prefill")
        drain(cluster, leaver, 0.0)
        assert (await asking).token_ids[0] == expected_tokens(PROMPT, 5, SLOW)
        assert chosen(cluster, "r", "prefill") is not leaver
        await cluster.wait_idle()


async def test_without_another_decode_worker_it_stays_as_long_as_it_can(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, [PREFILL, DECODE], config=SLOW) as cluster:
        asking = asyncio.create_task(ask(cluster, "r", 40))
        await until(lambda: cluster.engine.metrics.num_generated_tokens)
        drain(cluster, chosen(cluster, "r", "decode"), 0.01)
        assert (await asking).token_ids[0] == expected_tokens(PROMPT, 40, SLOW)
        assert cluster.engine.metrics.num_replanned == 0
        await cluster.wait_idle()


async def test_being_handed_over_again_and_again_fails_nothing(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, [PREFILL, *[DECODE] * 6], config=SLOW) as cluster:
        asking = asyncio.create_task(ask(cluster, "r", 200))
        for count in range(1, 6):
            await until(lambda count=count: cluster.engine.metrics.num_generated_tokens >= 10 * count)
            drain(cluster, chosen(cluster, "r", "decode"), 0.0)
            await until(lambda count=count: cluster.engine.metrics.num_replanned == count)
        assert (await asking).token_ids[0] == expected_tokens(PROMPT, 200, SLOW)
        await cluster.wait_idle()

"""A request goes where its prefix is: told by a request before it, or by the workers through etcd."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.prefix_index.block_table import Keys
from kvrelay.coordinator.prefix_index.follow import PrefixReplica
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.keys import prompt_keys
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.coordinator.scheduler.simple import LeastLoadedScheduler
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.etcd.server import run_etcd
from kvrelay.membership import register, worker_key
from kvrelay.worker.prefix_publisher import PrefixPublisher
from tests.support.eventually import eventually
from tests.support.fake_cluster import Generated
from tests.support.simulated_cluster import (
    DECODE,
    PREFILL,
    SimulatedWorker,
    simulated_cluster,
    simulated_coordinator,
)

ROLES = [PREFILL, PREFILL, PREFILL, PREFILL, DECODE, DECODE]
PROMPT = random.Random(1).choices(range(1000, 40_000), k=640)
MORE = random.Random(2).choices(range(1000, 40_000), k=33)


async def generate(engine: ClusterEngine, prompt: list[int], request_id: str) -> Generated:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, temperature=0.0, max_tokens=4)
    generated = Generated()
    async with asyncio.timeout(30):
        async for output in engine.generate(tokens_input(prompt), params, request_id):
            generated.add(output)
    return generated


def keys_of(worker: SimulatedWorker, prompt: list[int]) -> Keys:
    layout = worker.info.layout
    return prompt_keys(layout.fingerprint, "", layout.block_size_tokens, prompt)


def served(workers: Sequence[SimulatedWorker]) -> list[int]:
    """Requests that each worker's engine has had."""
    return [worker.host.counters["requests"] for worker in workers]


@contextlib.asynccontextmanager
async def fed_by_etcd(workers: Sequence[SimulatedWorker]) -> AsyncIterator[PrefixReplica]:
    """The index of a coordinator that knows only what the workers write."""
    replica = PrefixReplica(PrefixIndex())
    async with contextlib.AsyncExitStack() as stack:
        etcd = await stack.enter_async_context(run_etcd())
        client = await stack.enter_async_context(connect(EtcdConfig(endpoints=[etcd.endpoint])))
        for worker in workers:
            key = worker_key("c", worker.info.worker_id)
            registration = await stack.enter_async_context(register(client, key))
            publisher = PrefixPublisher(client, "c", worker.info.worker_id, worker.host.held_blocks)
            registration.accompany(publisher.run)
            registration.put(worker.info)
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(replica.follow(client, "c"))
            try:
                yield replica
            finally:
                following.cancel()


@pytest.mark.parametrize("policy", ["cost", "prefix-only"])
async def test_no_turn_computes_again_what_the_last_one_left(front_end: FrontEnd, policy: str) -> None:
    async with simulated_cluster(front_end, ROLES, policy=policy) as cluster:
        prompt, num_known_tokens = PROMPT, 0
        for number in range(5):
            turn = await generate(cluster.engine, prompt, f"r{number}")
            assert turn.outputs[-1].num_cached_tokens >= num_known_tokens
            num_known_tokens = len(prompt) // 16 * 16
            prompt = [*prompt, *turn.token_ids[0], *MORE]
        await cluster.wait_idle()


async def test_requests_of_one_prefix_go_to_one_pair(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, ROLES, policy="prefix-only") as cluster:
        prompts = [[*PROMPT, *random.Random(seed).choices(range(1000, 40_000), k=20)] for seed in range(8)]
        await asyncio.gather(*(generate(cluster.engine, prompt, f"r{i}") for i, prompt in enumerate(prompts)))
        assert sorted(served(cluster.workers)) == [0, 0, 0, 0, 8, 8], "those of a burst, too"
        await cluster.wait_idle()


async def test_the_index_follows_the_stores_of_the_workers(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, ROLES) as cluster, fed_by_etcd(cluster.workers) as replica:
        await generate(cluster.engine, PROMPT, "first")
        await cluster.wait_idle()
        num_held = sum(len(worker.host.held_blocks.hashes()) for worker in cluster.workers)
        assert num_held >= 2 * len(PROMPT) // 16
        await eventually(lambda: replica.figures().num_entries == num_held, "the index has what the stores have")


async def test_a_coordinator_that_has_sent_nothing_knows_from_etcd_where_a_prefix_is(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, ROLES) as cluster, fed_by_etcd(cluster.workers) as replica:
        await generate(cluster.engine, PROMPT, "first")
        await cluster.wait_idle()
        holding = served(cluster.workers)
        keys = keys_of(cluster.workers[0], PROMPT)
        whole = {
            worker.info.worker_id: len(keys) for worker, number in zip(cluster.workers, holding, strict=True) if number
        }
        await eventually(lambda: replica.index.match(keys) == whole, "who has had the prompt has all of it")
        other_coordinator = simulated_coordinator(
            front_end, cluster.workers, make_scheduler("prefix-only"), index=replica.index
        )
        async with other_coordinator as (other, _):
            await generate(other, [*PROMPT, *MORE], "second")
            timeline = other.timeline("second")
        assert served(cluster.workers) == [2 * number for number in holding]
        assert timeline is not None
        assert timeline.counters["prefill.blocks_loaded"] == len(PROMPT) // 16
        await cluster.wait_idle()


class FetchingScheduler(LeastLoadedScheduler):
    """Workers take turns, and fetch from whoever has most of the prompt."""

    def plan(self, request: RequestShape, workers: Sequence[WorkerView]) -> Decision:
        decision = super().plan(request, workers)
        having = [worker for worker in workers if worker.prefills and worker.worker_id in request.num_stored_blocks]
        return replace(decision, plan=replace(decision.plan, source=next(iter(having), None)))


async def test_a_prefill_worker_fetches_what_another_one_has(front_end: FrontEnd) -> None:
    async with simulated_cluster(front_end, [PREFILL, PREFILL, DECODE]) as cluster:
        coordinator = simulated_coordinator(front_end, cluster.workers, FetchingScheduler())
        async with coordinator as (engine, _):
            await generate(engine, PROMPT, "first")
            await cluster.wait_idle()
            await generate(engine, [*PROMPT, *MORE], "second")
        assert served(cluster.workers) == [1, 1, 2]
        assert cluster.workers[1].host.counters["blocks_fetched"] == len(PROMPT) // 16
        await cluster.wait_idle()

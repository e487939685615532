"""Workers and coordinators are restarted under load, one after the other: no request fails. Engines are simulated."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from kvrelay import etcd, membership
from kvrelay.client import AsyncClient
from kvrelay.client.drain import Drain, drain
from kvrelay.engine.simulated_model import SimulatedConfig, expected_tokens
from kvrelay.launch.state import RunningCluster
from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(300)

FLAGS = ("--engine", "simulated", "--prefill", "2", "--decode", "2", "--replicas", "2")
COORDINATORS = ("coordinator-0", "coordinator-1")
WORKERS = ("prefill-0", "decode-0", "prefill-1", "decode-1")
NUM_CALLERS = 8
RESTART_TIMEOUT_S = 60.0
MODEL = SimulatedConfig()


@dataclass(slots=True)
class Load:
    """Callers that ask one request after the other, half of them over HTTP."""

    state: RunningCluster
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    num_right: int = 0
    failures: list[str] = field(default_factory=list)

    async def call(self, number: int) -> None:
        ask = self._over_http if number % 2 else self._over_grpc
        for count in itertools.count():
            if self.is_over.is_set():
                return
            rng = random.Random(f"{number}-{count}")
            prompt = rng.choices(range(1000, 40_000), k=rng.randint(5, 300))
            num_tokens = rng.randint(5, 150) if ask == self._over_grpc else rng.randint(5, 40)
            try:
                got = await ask(prompt, num_tokens)
            except Exception as error:  # Whatever it is, it is counted.
                self.failures.append(f"{ask.__name__}: {error!r}")
                continue
            if got == expected_tokens(prompt, num_tokens, MODEL):
                self.num_right += 1
            else:
                self.failures.append(f"{ask.__name__}: {len(got)} tokens, and not the right ones")

    async def _over_grpc(self, prompt: list[int], num_tokens: int) -> list[int]:
        async with AsyncClient(self.state.grpc_address, timeout_s=60) as client:
            answer = await client.generate(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return list(answer.token_ids)

    async def _over_http(self, prompt: list[int], num_tokens: int) -> list[int]:
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"model": self.state.model, "return_token_ids": True}
        async with httpx.AsyncClient(base_url=self.state.http_url, timeout=60) as http:
            answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    with live_cluster(tmp_path_factory.mktemp("up"), *FLAGS) as cluster:
        yield cluster


async def test_no_request_fails_while_every_worker_and_coordinator_is_restarted(cluster: LiveCluster) -> None:
    load = Load(cluster.state)
    async with asyncio.TaskGroup() as tasks:
        for number in range(NUM_CALLERS):
            tasks.create_task(load.call(number))
        try:
            for worker_id in WORKERS:
                await _restarted(cluster.state, worker_id, lambda worker_id=worker_id: _drain(cluster.state, worker_id))
            for coordinator_id in COORDINATORS:
                await _restarted(cluster.state, coordinator_id, lambda name=coordinator_id: _end(cluster, name))
            num_right = load.num_right
            async with asyncio.timeout(30):
                while load.num_right < num_right + NUM_CALLERS:
                    await asyncio.sleep(0.1)
        finally:
            load.is_over.set()
    assert not load.failures
    assert load.num_right > 50
    async with open_gauges(cluster.state) as gauges:
        await gauges.wait_idle(timeout_s=10)


async def _restarted(state: RunningCluster, member_id: str, end: Callable[[], Awaitable[None]]) -> None:
    """End it, and wait until its successor is in the cluster's list."""
    before = await _records(state)
    await end()
    async with asyncio.timeout(RESTART_TIMEOUT_S):
        while (now := await _records(state)).get(member_id) in (None, before[member_id]) or now.keys() != before.keys():
            await asyncio.sleep(0.1)


async def _records(state: RunningCluster) -> dict[str, str]:
    """What tells a process from its predecessor, by member."""
    async with etcd.connect(etcd.EtcdConfig(endpoints=state.etcd)) as client:
        workers = await membership.list_workers(client, state.cluster)
        coordinators = await membership.list_coordinators(client, state.cluster)
    return {worker.worker_id: worker.incarnation for worker in workers} | {
        coordinator.coordinator_id: coordinator.own_http_url for coordinator in coordinators
    }


async def _drain(state: RunningCluster, worker_id: str) -> None:
    await drain(state.etcd, state.cluster, Drain(worker_id=worker_id, drain_s=2.0), lambda _: None)


async def _end(cluster: LiveCluster, coordinator_id: str) -> None:
    cluster.process_of(coordinator_id).send_signal(signal.SIGTERM)

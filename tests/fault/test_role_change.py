"""Workers change their roles back and forth under load, and no request is lost. Engines are simulated."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient
from kvrelay.engine.simulated_model import SimulatedConfig, expected_tokens
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.launch.state import RunningCluster
from kvrelay.membership import list_coordinators, list_workers
from kvrelay.v1 import cluster_pb2
from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(300)

NUM_CLIENTS = 8
NUM_TOKENS = 24
CHANGES: Sequence[tuple[str, str]] = [
    ("prefill-1", "decode"),
    ("decode-0", "prefill"),
    ("decode-1", "both"),
    ("prefill-0", "both"),
    ("prefill-1", "prefill"),
    ("decode-0", "decode"),
    ("decode-1", "decode"),
    ("prefill-0", "prefill"),
]
"""Every step leaves somebody for either role; the last one leaves all as they were."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    flags = ("--engine", "simulated", "--prefill", "2", "--decode", "2", "--replicas", "2")
    with live_cluster(tmp_path_factory.mktemp("up"), *flags) as cluster:
        yield cluster


async def test_no_request_is_lost_while_roles_go_back_and_forth(cluster: LiveCluster) -> None:
    over = asyncio.Event()
    async with open_gauges(cluster.state) as gauges, asyncio.TaskGroup() as tasks:
        addresses = await coordinator_addresses(cluster.state)
        assert len(addresses) == 2
        clients = [
            tasks.create_task(ask_until(over, address, seed))
            for seed, address in zip(range(NUM_CLIENTS), itertools.cycle(addresses), strict=False)
        ]
        for worker_id, role in CHANGES:
            await gauges.wait_busy()
            output = await set_role(cluster, worker_id, role)
            assert f"-> {role}; nothing of the old role is left to do" in output
        over.set()
    numbers = [await client for client in clients]
    assert min(numbers) > len(CHANGES), "everybody was served all the time"
    async with open_gauges(cluster.state) as gauges:
        await gauges.wait_idle(timeout_s=10)
        work = {worker: status.counters["requests"] for worker, status in (await gauges.read()).items()}
    assert min(work.values()) > 0
    async with connect(EtcdConfig(endpoints=cluster.state.etcd)) as client:
        roles = {worker.worker_id: worker.role for worker in await list_workers(client, cluster.state.cluster)}
    assert roles == {
        "prefill-0": cluster_pb2.ROLE_PREFILL,
        "prefill-1": cluster_pb2.ROLE_PREFILL,
        "decode-0": cluster_pb2.ROLE_DECODE,
        "decode-1": cluster_pb2.ROLE_DECODE,
    }


async def test_a_worker_that_does_both_serves_alone(cluster: LiveCluster) -> None:
    """The others are given roles under which they have nothing to do."""
    for worker_id, role in [("decode-0", "both"), ("decode-1", "prefill")]:
        await set_role(cluster, worker_id, role)
    try:
        over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(ask_until(over, cluster.state.grpc_address, seed=99))
            over.set()
        assert await asking == 1
    finally:
        for worker_id in ("decode-0", "decode-1"):
            await set_role(cluster, worker_id, "decode")


async def coordinator_addresses(state: RunningCluster) -> list[str]:
    """Each replica's own."""
    async with connect(EtcdConfig(endpoints=state.etcd)) as client:
        return [info.own_grpc_address for info in await list_coordinators(client, state.cluster)]


async def ask_until(over: asyncio.Event, address: str, seed: int) -> int:
    """Ask one question after the other, at least one; every answer is right. Returns how many there were."""
    draw, config = random.Random(seed), SimulatedConfig()
    async with AsyncClient(address, timeout_s=60) as client:
        for number in itertools.count(1):
            prompt = [draw.randrange(3, 40_000) for _ in range(draw.randrange(5, 700))]
            answer = await client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)
            assert list(answer.token_ids) == expected_tokens(prompt, NUM_TOKENS, config)
            if over.is_set():
                return number
    raise AssertionError


async def set_role(cluster: LiveCluster, worker_id: str, role: str) -> str:
    """By the real command; returns what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrelay.cli", "role", "set", worker_id, role),
        env={**os.environ, "XDG_STATE_HOME": str(Path(cluster.output).parent)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    return stdout.decode()

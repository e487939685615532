"""A host's cable is pulled: connections to it stay open and nobody is told. Its streams go on elsewhere.

Every process but etcd runs on a host of its own, which is a network namespace here. Engines are simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvrelay import etcd, membership
from kvrelay.client import AsyncClient
from kvrelay.engine.simulated_model import SimulatedConfig, expected_tokens
from kvrelay.etcd.server import find_etcd, server_arguments
from kvrelay.grpc_options import open_channel
from kvrelay.launch.readiness import wait_listening
from kvrelay.v1 import worker_pb2_grpc
from tests.support.cluster_gauges import ClusterGauges
from tests.support.hosts import Host, Hosts, NoHostsError, open_hosts

pytestmark = pytest.mark.timeout(180)

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
ETCD_PORT, GRPC_PORT, KV_PORT = 2379, 7001, 7002
PROMPT = list(range(1000, 1300))
NUM_TOKENS = 150
NUM_STREAMS = 6
NOTICED_S = 12.0
"""Three heartbeats are missed, or a lease of etcd ends; then the prompt is computed once more."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(open_hosts(1 + len(WORKERS)))
        except NoHostsError as error:
            pytest.skip(f"no hosts to be had: {error}")
        yield opened


@dataclass(frozen=True, slots=True)
class Machines:
    coordinator_address: str
    of_worker: dict[str, Host]
    etcd: etcd.EtcdClient

    async def wait_registered(self, worker_ids: set[str]) -> None:
        """Until etcd knows these workers and no others."""
        async with asyncio.timeout(60):
            while {info.worker_id for info in await membership.list_workers(self.etcd, "default")} != worker_ids:
                await asyncio.sleep(0.1)

    async def wait_idle(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stubs = {}
            for worker_id, host in self.of_worker.items():
                channel = await stack.enter_async_context(open_channel(f"{host.address}:{GRPC_PORT}"))
                stubs[worker_id] = worker_pb2_grpc.WorkerStub(channel)
            await ClusterGauges(stubs).wait_idle(timeout_s=20)


@contextlib.asynccontextmanager
async def machines(hosts: Hosts, directory: Path) -> AsyncIterator[Machines]:
    endpoint = f"{hosts.own_address}:{ETCD_PORT}"
    with contextlib.ExitStack() as processes:
        data = directory / "etcd"
        _start(
            processes, directory, "etcd", server_arguments(find_etcd(), data, host=hosts.own_address, port=ETCD_PORT)
        )
        await wait_listening(endpoint)
        first, *others = hosts.hosts
        shared = ["--etcd", endpoint]
        command = ["coordinator", *shared, "--http", f"{first.address}:8000", "--grpc", f"{first.address}:50051"]
        _start(processes, directory, "coordinator", first.command([sys.executable, "-m", "kvrelay.cli", *command]))
        for worker_id, host in zip(WORKERS, others, strict=True):
            role = worker_id.partition("-")[0]
            command = [f"{role}-worker", *shared, "--worker-id", worker_id, "--engine", "simulated"]
            command += ["--listen", f"{host.address}:{GRPC_PORT}", "--kv-listen", f"{host.address}:{KV_PORT}"]
            command += ["--advertise", f"{host.address}:{GRPC_PORT}", "--kv-transport", "grpc"]
            command += ["--", "--decode-step-s", "0.05"]
            _start(processes, directory, worker_id, host.command([sys.executable, "-m", "kvrelay.cli", *command]))
        async with etcd.connect(etcd.EtcdConfig(endpoints=[endpoint])) as client:
            cluster = Machines(f"{first.address}:50051", dict(zip(WORKERS, others, strict=True)), client)
            await cluster.wait_registered(set(WORKERS))
            await wait_listening(cluster.coordinator_address)
            yield cluster


def _start(processes: contextlib.ExitStack, directory: Path, name: str, command: list[str]) -> None:
    """Told to end, and waited for, in the reverse order."""
    log = processes.enter_context((directory / f"{name}.log").open("wb"))
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def end() -> None:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()

    processes.callback(end)


async def test_streams_go_on_when_the_host_of_their_decode_worker_is_unplugged(hosts: Hosts, tmp_path: Path) -> None:
    async with machines(hosts, tmp_path) as cluster, AsyncClient(cluster.coordinator_address, timeout_s=90) as client:
        streams = [asyncio.create_task(_stream(client, number)) for number in range(NUM_STREAMS)]
        await asyncio.sleep(2.0)
        victim = "decode-0"
        cluster.of_worker[victim].unplug()
        pauses = []
        for number, stream in enumerate(streams):
            tokens, pause_s = await stream
            assert tokens == expected_tokens(_prompt(number), NUM_TOKENS, SimulatedConfig()), f"stream {number}"
            pauses.append(pause_s)
        print("longest pauses:", ", ".join(f"{pause_s:.2f} s" for pause_s in pauses))
        assert max(pauses) > 1.0, "nobody was there"
        assert max(pauses) < NOTICED_S
        await cluster.wait_registered(set(WORKERS) - {victim})
        cluster.of_worker[victim].plug_in()
        await cluster.wait_registered(set(WORKERS))
        tokens, _ = await _stream(client, 0)
        assert tokens == expected_tokens(_prompt(0), NUM_TOKENS, SimulatedConfig())
        await cluster.wait_idle()


async def test_a_prompt_goes_on_when_the_host_of_its_prefill_worker_is_unplugged(hosts: Hosts, tmp_path: Path) -> None:
    async with machines(hosts, tmp_path) as cluster, AsyncClient(cluster.coordinator_address, timeout_s=90) as client:
        for worker_id in ("prefill-0", "prefill-1"):
            cluster.of_worker[worker_id].unplug()
        began_s = time.monotonic()
        tokens, _ = await _stream(client, 0)
        print(f"answered after {time.monotonic() - began_s:.2f} s without any prefill worker")
        assert tokens == expected_tokens(_prompt(0), NUM_TOKENS, SimulatedConfig())
        for worker_id in ("prefill-0", "prefill-1"):
            cluster.of_worker[worker_id].plug_in()
        await cluster.wait_registered(set(WORKERS))
        await cluster.wait_idle()


def _prompt(number: int) -> list[int]:
    return [number, *PROMPT]


async def _stream(client: AsyncClient, number: int) -> tuple[list[int], float]:
    """All tokens, and the longest time between two chunks."""
    tokens: list[int] = []
    longest_s, last_s = 0.0, time.monotonic()
    async with client.stream(_prompt(number), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True) as chunks:
        async for chunk in chunks:
            now_s = time.monotonic()
            longest_s = max(longest_s, now_s - last_s) if tokens else 0.0
            last_s = now_s
            tokens += chunk.token_ids
    return tokens, longest_s

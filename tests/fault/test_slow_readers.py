"""Clients that take a byte a second, or nothing, hold no worker and little of a coordinator; others are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from kvrelay.v1 import common_pb2, inference_pb2
from tests.support.cluster_gauges import open_gauges
from tests.support.deaf_grpc import deaf_client
from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(240)

NUM_CLIENTS = 100
"""Over HTTP, and as many over gRPC."""
NUM_TOKENS = 300
MAX_GROWTH_BYTES = 100_000 * 2 * NUM_CLIENTS
"""docs/limits.md promises less than half of it."""
STALL_TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    flags = ("--engine", "simulated", "--coordinator-args", f"--stall-timeout {STALL_TIMEOUT_S}")
    with live_cluster(tmp_path_factory.mktemp("up"), *flags) as cluster:
        yield cluster


async def test_they_hold_no_worker_and_little_memory(cluster: LiveCluster) -> None:
    coordinator = cluster.process_of("coordinator")
    await _ask(cluster)
    before = coordinator.memory_info().rss
    async with contextlib.AsyncExitStack() as stack:
        gauges = await stack.enter_async_context(open_gauges(cluster.state))
        slow = [await stack.enter_async_context(_slow_stream(cluster, number)) for number in range(NUM_CLIENTS)]
        for number in range(NUM_CLIENTS):
            await stack.enter_async_context(_deaf_call(cluster, number))
        await gauges.wait_busy()
        await _ask(cluster)
        # The workers are done long before anybody has taken an answer.
        await gauges.wait_idle(timeout_s=60)
        assert not any(client.num_bytes > 1000 for client in slow)
        assert coordinator.memory_info().rss - before < MAX_GROWTH_BYTES
        async with asyncio.timeout(4 * STALL_TIMEOUT_S):
            while _log_of(cluster).count("a client does not read") < NUM_CLIENTS:
                await asyncio.sleep(0.2)
        await _ask(cluster)
    async with asyncio.timeout(10):
        while await _num_in_flight(cluster):
            await asyncio.sleep(0.1)


class _SlowReader:
    """Takes a byte a second of what comes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.num_bytes = 0

    async def read(self) -> None:
        loop = asyncio.get_running_loop()
        while await loop.sock_recv(self._connection, 1):
            self.num_bytes += 1
            await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def _slow_stream(cluster: LiveCluster, number: int) -> AsyncIterator[_SlowReader]:
    host, _, port = cluster.state.http_url.removeprefix("http://").rpartition(":")
    body = {"model": cluster.state.model, "prompt": [number] * 50, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, int(port)))
        await loop.sock_sendall(connection, f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        reader = _SlowReader(connection)
        reading = asyncio.create_task(reader.read())
        try:
            yield reader
        finally:
            reading.cancel()
            await asyncio.wait([reading])


@contextlib.asynccontextmanager
async def _deaf_call(cluster: LiveCluster, number: int) -> AsyncIterator[None]:
    request = inference_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=[1000 + number] * 50),
        sampling=common_pb2.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
    )
    async with deaf_client(int(cluster.state.grpc_address.rpartition(":")[2])) as client:
        client.call("/kvrelay.v1.Inference/Generate", request.SerializeToString())
        answering_pings = asyncio.create_task(client.ended())
        try:
            yield
        finally:
            answering_pings.cancel()
            await asyncio.wait([answering_pings])


def _log_of(cluster: LiveCluster) -> str:
    return (Path(cluster.state.log_dir) / "coordinator.log").read_text()


async def _ask(cluster: LiveCluster) -> None:
    body = {"model": cluster.state.model, "prompt": [7] * 50, "max_tokens": 4}
    async with httpx.AsyncClient(base_url=cluster.state.http_url, timeout=20) as http:
        answer = await http.post("/v1/completions", json=body)
    assert answer.json()["usage"]["completion_tokens"] == 4


async def _num_in_flight(cluster: LiveCluster) -> int:
    async with httpx.AsyncClient(base_url=cluster.state.http_url, timeout=20) as http:
        page = (await http.get("/metrics")).text
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in page.splitlines()
        if line.startswith("kvrelay_in_flight_requests{")
    )

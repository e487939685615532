"""Ten thousand clients that only connect cost a coordinator some memory for some seconds, and nobody else an answer."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(240)

NUM_CONNECTIONS = 10_000
NUM_DRIBBLING = 1_000
"""Of these, those that have begun a request."""
MAX_GROWTH_BYTES = 20_000 * NUM_CONNECTIONS
HEADER_TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    with live_cluster(tmp_path_factory.mktemp("up"), "--engine", "simulated") as cluster:
        yield cluster


@pytest.fixture
def open_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2 * NUM_CONNECTIONS:
        pytest.skip(f"this process may open {before[1]} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_they_are_closed_and_others_served_meanwhile(cluster: LiveCluster, open_files: None) -> None:
    coordinator = cluster.process_of("coordinator")
    await _ask(cluster)
    before = coordinator.memory_info().rss
    num_before = _num_open(coordinator)
    connections = [await _connect(cluster) for _ in range(NUM_CONNECTIONS)]
    try:
        for connection in connections[:NUM_DRIBBLING]:
            connection.send(b"POST /v1/completions HTTP/1.1\r\n")
        async with asyncio.timeout(HEADER_TIMEOUT_S):
            while _num_open(coordinator) < 0.9 * NUM_CONNECTIONS:  # The last wait in the kernel to be accepted.
                await asyncio.sleep(0.1)
        await _ask(cluster)
        assert coordinator.memory_info().rss - before < MAX_GROWTH_BYTES
        async with asyncio.timeout(3 * HEADER_TIMEOUT_S):
            while _num_open(coordinator) > num_before + 10:
                await asyncio.sleep(0.2)
        await _ask(cluster)
    finally:
        for connection in connections:
            connection.close()


async def _connect(cluster: LiveCluster) -> socket.socket:
    host, _, port = cluster.state.http_url.removeprefix("http://").rpartition(":")
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    return connection


async def _ask(cluster: LiveCluster) -> None:
    body = {"model": cluster.state.model, "prompt": [7] * 50, "max_tokens": 4}
    async with httpx.AsyncClient(base_url=cluster.state.http_url, timeout=20) as http:
        answer = await http.post("/v1/completions", json=body)
    assert answer.json()["usage"]["completion_tokens"] == 4


def _num_open(process: psutil.Process) -> int:
    return process.num_fds()

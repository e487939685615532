"""Replicas of a coordinator share ports, and outlive one another. Engines are simulated, everything else is real."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from kvrelay.client import Client
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.etcd.server import run_etcd
from kvrelay.launch.state import RunningCluster
from kvrelay.membership import list_coordinators
from kvrelay.v1 import cluster_pb2
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.processes import gone

pytestmark = pytest.mark.timeout(300)

MODEL = "SmolLM2-135M-Instruct"
IDS = ["coordinator-0", "coordinator-1"]
WAIT_S = 90.0
PROMISED_STOP_S = 7.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    with live_cluster(tmp_path_factory.mktemp("up"), "--engine", "simulated", "--replicas", "2") as cluster:
        yield cluster


def test_every_replica_listens_at_the_shared_ports_and_answers_at_its_own(cluster: LiveCluster) -> None:
    records = _records(cluster.state)
    assert [record.coordinator_id for record in records] == IDS
    assert {(record.http_url, record.grpc_address) for record in records} == {
        (cluster.state.http_url, cluster.state.grpc_address)
    }
    own = {address for record in records for address in (record.own_http_url, record.own_grpc_address)}
    assert len(own) == 4
    for record in records:
        assert _ask(record.own_http_url).status_code == 200
        with Client(record.own_grpc_address) as client:
            assert [model.name for model in client.models()] == [MODEL]
        ports = {int(address.rpartition(":")[2]) for address in (record.http_url, record.own_http_url)}
        assert ports <= _listening_at(cluster.process_of(record.coordinator_id))
        metrics = httpx.get(f"{record.own_http_url}/metrics", timeout=20).text
        assert f'kvrelay_in_flight_requests{{coordinator="{record.coordinator_id}"}} 0.0' in metrics


def test_any_of_them_answers_at_the_shared_ports(cluster: LiveCluster) -> None:
    assert {_ask(cluster.state.http_url).status_code for _ in range(20)} == {200}
    for _ in range(5):
        with Client(cluster.state.grpc_address) as client:
            assert [model.name for model in client.models()] == [MODEL]


def test_while_one_is_dead_the_other_serves_and_it_comes_back(cluster: LiveCluster) -> None:
    before = {record.coordinator_id: record for record in _records(cluster.state)}
    victim = cluster.process_of(IDS[0])
    victim.kill()
    assert gone([victim.pid])
    assert {_ask(cluster.state.http_url).status_code for _ in range(20)} == {200}
    assert _ask(before[IDS[1]].own_http_url).status_code == 200
    with pytest.raises(httpx.HTTPError):
        _ask(before[IDS[0]].own_http_url)

    def is_back() -> bool:
        now = {record.coordinator_id: record for record in _records(cluster.state)}
        back = now.get(IDS[0])
        return back is not None and back.own_http_url != before[IDS[0]].own_http_url and now.keys() == before.keys()

    _wait(cluster, is_back)
    assert {_ask(record.own_http_url).status_code for record in _records(cluster.state)} == {200}
    assert "coordinator was ended" not in cluster.output.read_text()


def test_the_process_above_them_may_be_killed_too(cluster: LiveCluster) -> None:
    """What it started ends with it, and `up` starts all of it again."""
    above = cluster.process_of("--replicas")
    below = [child.pid for child in above.children(recursive=True)]
    above.kill()
    assert gone([above.pid, *below], timeout_s=15)
    _wait(cluster, lambda: all(f"{name} is back." in cluster.output.read_text() for name in IDS))
    assert _ask(cluster.state.http_url).status_code == 200


async def test_sigterm_ends_all_of_them_in_time(tmp_path: Path) -> None:
    async with run_etcd() as etcd, connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        with _coordinator(tmp_path, "--etcd", etcd.endpoint) as process:
            async with asyncio.timeout(WAIT_S):
                while len(records := await list_coordinators(client, "default")) < 2:
                    assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            assert len({record.http_url for record in records}) == 1
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, WAIT_S) == 0
            assert time.monotonic() - began < PROMISED_STOP_S
            assert gone(family, timeout_s=0.5)
            assert not await list_coordinators(client, "default")


async def test_replicas_that_cannot_start_end_it_all_with_their_exit_code(tmp_path: Path) -> None:
    async with run_etcd() as etcd:
        with _coordinator(tmp_path, "--etcd", etcd.endpoint, "--tokenizer", "/no/such") as process:
            assert await asyncio.to_thread(process.wait, WAIT_S) == 1
    assert "replica cannot start" in (tmp_path / "log").read_text()


@contextmanager
def _coordinator(directory: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two replicas at free ports; nothing of them is left."""
    words = ["coordinator", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--replicas", "2", *flags]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay.cli", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _records(state: RunningCluster) -> Sequence[cluster_pb2.CoordinatorInfo]:
    async def records() -> Sequence[cluster_pb2.CoordinatorInfo]:
        async with connect(EtcdConfig(endpoints=state.etcd)) as client:
            return await list_coordinators(client, state.cluster)

    return asyncio.run(records())


def _listening_at(process: psutil.Process) -> set[int]:
    return {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}


def _ask(http_url: str) -> httpx.Response:
    """Over a new connection."""
    body = {"model": MODEL, "prompt": "lighthouse " * 50, "max_tokens": 4}
    return httpx.post(f"{http_url}/v1/completions", json=body, timeout=30)


def _wait(cluster: LiveCluster, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, cluster.output.read_text()
        with suppress(subprocess.TimeoutExpired):
            cluster.process.wait(0.2)

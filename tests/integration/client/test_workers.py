"""`kvrelay workers` against a real etcd, a worker that answers and one that does not."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.membership import worker_key
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc
from tests.support.etcd_process import etcd_process

STATUS = worker_pb2.WorkerStatus(
    worker_id="p1",
    num_running_requests=3,
    num_waiting_requests=1,
    engine_kv_usage=0.25,
    store=worker_pb2.BlockStoreStatus(
        num_slots=100, num_free=50, num_reserved=4, num_pinned=5, num_evictable=40, num_granted=1
    ),
)


class Worker(worker_pb2_grpc.WorkerServicer):
    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.WorkerStatus:
        return STATUS

    def Session(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def cluster() -> AsyncIterator[str]:
    """etcd with one living worker p1 and the record of a silent one d1; yields etcd's address."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(Worker(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with etcd_process() as etcd, connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        p1 = cluster_pb2.WorkerInfo(
            worker_id="p1",
            role=cluster_pb2.ROLE_PREFILL,
            state=cluster_pb2.WORKER_STATE_READY,
            model="tiny",
            address=f"127.0.0.1:{port}",
            engine="simulated",
        )
        d1 = cluster_pb2.WorkerInfo(worker_id="d1", role=cluster_pb2.ROLE_DECODE, model="tiny", address="127.0.0.1:1")
        for info in (p1, d1):
            await client.put(worker_key("default", info.worker_id), info.SerializeToString())
        yield etcd.endpoint
    await server.stop(0)


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["workers", *arguments])


async def test_the_table_and_the_json() -> None:
    async with cluster() as etcd:
        table = await run("--etcd", etcd)
        assert table.exit_code == 0, table.output
        lines = [line.split() for line in table.stdout.splitlines()]
        assert ["d1", "decode", "tiny", "127.0.0.1:1", "silent", "-", "-", "-", "-", "-"] in lines
        (p1,) = [line for line in lines if line[:1] == ["p1"]]
        assert p1[4:] == ["ready", "3", "1", "25%", "10/100", "40"]
        rows = json.loads((await run("--etcd", etcd, "--json")).stdout)
        assert [(row["worker_id"], row["state"], row["num_used_slots"]) for row in rows] == [
            ("p1", "ready", 10),
            ("d1", "silent", None),
        ]


async def test_blocks_on_disk_are_shown_where_there_is_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    with_disk = worker_pb2.WorkerStatus()
    with_disk.CopyFrom(STATUS)
    with_disk.store.disk_bytes, with_disk.store.num_disk_blocks = 1 << 30, 77
    async with cluster() as etcd:
        assert "on disk" not in (await run("--etcd", etcd)).stdout
        monkeypatch.setattr("tests.integration.client.test_workers.STATUS", with_disk)
        table = await run("--etcd", etcd)
        lines = [line.split() for line in table.stdout.splitlines()]
        assert ["10/100", "40", "77"] in [line[-3:] for line in lines]
        assert ["d1", "decode", "tiny", "127.0.0.1:1", "silent", *["-"] * 6] in lines
        rows = json.loads((await run("--etcd", etcd, "--json")).stdout)
        assert (rows[0]["disk_bytes"], rows[0]["num_disk_blocks"]) == (1 << 30, 77)


async def test_an_empty_cluster_is_said_to_be_empty() -> None:
    async with etcd_process() as etcd:
        result = await run("--etcd", etcd.endpoint, "--cluster", "other")
        assert result.exit_code == 4
        assert result.stderr == f"kvrelay: no worker is registered in cluster 'other' at {etcd.endpoint}\n"


async def test_no_etcd_is_one_line() -> None:
    result = await run("--etcd", "127.0.0.1:1")
    assert result.exit_code == 4
    assert result.stderr.startswith("kvrelay: no etcd answers at 127.0.0.1:1")
    assert result.stderr.count("\n") == 1

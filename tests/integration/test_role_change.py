"""`kvrelay role set` against a real etcd and a real worker: what it says, and what stays when a lease is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.etcd import EtcdClient, EtcdConfig, connect
from kvrelay.etcd.server import run_etcd
from kvrelay.launch.engines import EngineChoice
from kvrelay.launch.worker import Served, WorkerConfig, open_server
from kvrelay.membership import list_workers, register, worker_key
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.leaving import Leaving
from kvrelay.worker.running_host import open_host
from kvrelay.worker.store_config import StoreConfig

KEY = worker_key("default", "w")


@dataclass(slots=True)
class Cluster:
    endpoint: str
    client: EtcdClient
    served: Served
    host: WorkerHost

    async def role(self) -> str:
        """As etcd has it."""
        (info,) = await list_workers(self.client, "default")
        return cluster_pb2.Role.Name(info.role)

    async def set_role(self, *arguments: str) -> Result:
        """The worker logs to the same stdout."""
        words = ["role", "set", *arguments, "--etcd", self.endpoint]
        return await asyncio.to_thread(CliRunner().invoke, app, words)


@asynccontextmanager
async def one_worker() -> AsyncIterator[Cluster]:
    """A decode worker in the cluster's list."""
    config = WorkerConfig(
        role=cluster_pb2.ROLE_DECODE,
        worker_id="w",
        etcd=[],
        engine=EngineChoice(model="m", served_model_name="m"),
    )
    async with (
        run_etcd() as etcd,
        connect(EtcdConfig(endpoints=[etcd.endpoint])) as client,
        register(client, KEY) as registration,
        open_host(SimulatedEngine(SimulatedConfig()), StoreConfig(size_bytes=1 << 20), Tracing()) as host,
        open_server(config, host, registration.update, Leaving(asyncio.Event(), 0.0)) as served,
    ):
        await registration.update(served.record.info)
        yield Cluster(etcd.endpoint, client, served, host)


async def test_the_record_has_the_new_role_and_the_command_says_what_changed() -> None:
    async with one_worker() as cluster:
        result = await cluster.set_role("w", "both")
        assert result.exit_code == 0
        assert result.stdout.endswith("w: decode -> both; nothing of the old role is left to do\n")
        assert await cluster.role() == "ROLE_BOTH"
        table = await asyncio.to_thread(CliRunner().invoke, app, ["workers", "--etcd", cluster.endpoint])
        assert ["w", "both", "m"] in [line.split()[:3] for line in table.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["x", "both"], 2, "kvrelay: there is no worker 'x'; there are: w\n"),
        (["w", "prefill"], 2, "kvrelay: w is the last worker that decodes for model 'm'"),
    ],
)
async def test_what_makes_no_sense_is_told_in_one_line(arguments: list[str], exit_code: int, message: str) -> None:
    async with one_worker() as cluster:
        result = await cluster.set_role(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (exit_code, 1)
        assert result.stderr.startswith(message)
        assert await cluster.role() == "ROLE_DECODE"
        assert (await cluster.set_role("w", "prefill", "--force")).exit_code == 0
        assert await cluster.role() == "ROLE_PREFILL"


async def test_a_worker_that_drains_refuses_although_the_list_does_not_say_so_yet() -> None:
    async with one_worker() as cluster:
        cluster.served.record.info.state = cluster_pb2.WORKER_STATE_DRAINING
        result = await cluster.set_role("w", "both")
        assert (result.exit_code, result.stderr) == (2, "kvrelay: worker w drains, so it takes no other role\n")


async def test_requests_of_the_old_role_are_waited_for() -> None:
    async with one_worker() as cluster:
        with cluster.host.job("decode"):
            result = await cluster.set_role("w", "prefill", "--force", "--timeout", "0.5")
            assert result.exit_code == 1
            first, last = result.stderr.splitlines()
            assert first == "w still has 1 requests of the old role"
            assert last.startswith("kvrelay: w has role prefill now, but it still works on requests of the old one")
            assert await cluster.role() == "ROLE_PREFILL"
        assert (await cluster.set_role("w", "prefill")).exit_code == 0


async def test_a_worker_that_is_gone_is_told_to_be_so() -> None:
    async with run_etcd() as etcd, connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        info = cluster_pb2.WorkerInfo(worker_id="w", role=cluster_pb2.ROLE_PREFILL, address="127.0.0.1:1")
        await client.put(KEY, info.SerializeToString())
        words = ["role", "set", "w", "both", "--etcd", etcd.endpoint]
        result = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert result.exit_code == 4
        assert "worker w at 127.0.0.1:1 does not answer" in result.stderr


async def test_the_role_outlives_a_lost_lease() -> None:
    async with one_worker() as cluster:
        assert (await cluster.set_role("w", "both")).exit_code == 0
        entry = await cluster.client.get(KEY)
        assert entry is not None
        await cluster.client.revoke_lease(entry.lease)
        async with asyncio.timeout(20):
            while (again := await cluster.client.get(KEY)) is None:
                pass
        assert again.lease != entry.lease
        assert await cluster.role() == "ROLE_BOTH"

"""What a worker's port tells others: who it is, what it serves, and where KV blocks go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.grpc_options import open_channel
from kvrelay.kv_transfer.peer import Peer
from kvrelay.launch.engines import EngineChoice
from kvrelay.launch.worker import Served, WorkerConfig, open_server
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.leaving import Leaving
from kvrelay.worker.running_host import open_host
from kvrelay.worker.store_config import StoreConfig
from tests.support.sshd import free_port


async def publish(_: cluster_pb2.WorkerInfo) -> None:
    """There is no list."""


@asynccontextmanager
async def served(**values: Any) -> AsyncIterator[tuple[Served, WorkerHost]]:
    config = WorkerConfig(
        role=cluster_pb2.ROLE_DECODE,
        worker_id="w",
        etcd=[],
        engine=EngineChoice(model="m", served_model_name="m"),
        **values,
    )
    engine, store = SimulatedEngine(SimulatedConfig()), StoreConfig(size_bytes=1 << 20)
    async with (
        open_host(engine, store, Tracing()) as host,
        open_server(config, host, publish, Leaving(asyncio.Event(), 0.0)) as worker,
    ):
        yield worker, host


async def push_address(worker: Served, host: WorkerHost) -> str:
    """Where it wants the blocks that it is offered."""
    peer = Peer(worker.record.info.address.replace("outside", "127.0.0.1"), worker.record.info.layout)
    try:
        offer = kv_transfer_pb2.OfferRequest(request_id="r", layout=host.info.layout, block_hashes=bytes(16))
        async with peer.offered(offer) as want:
            return want.push_address
    finally:
        await peer.close()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, "127.0.0.1:{kv}"),
        ({"advertise": "outside:{own}"}, "outside:{kv}"),
        ({"advertise": "outside:{own}", "kv_advertise": "nat:9"}, "nat:9"),
    ],
)
async def test_kv_blocks_go_where_it_listens_unless_another_address_is_advertised(
    values: dict[str, str], wanted: str
) -> None:
    own, kv = free_port(), free_port()
    values = {name: value.format(own=own) for name, value in values.items()}
    async with served(listen=f"127.0.0.1:{own}", kv_listen=f"127.0.0.1:{kv}", **values) as (worker, host):
        assert await push_address(worker, host) == wanted.format(kv=kv)


async def test_reflection_lists_what_the_port_serves() -> None:
    async with served() as (worker, _), open_channel(worker.record.info.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        async with asyncio.timeout(10):
            answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert names == {"kvrelay.v1.Worker", health.SERVICE_NAME, reflection.SERVICE_NAME}

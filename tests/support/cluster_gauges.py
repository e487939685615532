"""What the workers of a running cluster say about themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kvrelay import etcd, membership
from kvrelay.grpc_options import open_channel
from kvrelay.launch.state import RunningCluster
from kvrelay.v1 import worker_pb2, worker_pb2_grpc

_POLL_S = 0.02


class ClusterGauges:
    """Reads the gauges of every worker; made by `open_gauges`."""

    def __init__(self, stubs: dict[str, worker_pb2_grpc.WorkerAsyncStub]) -> None:
        self._stubs = stubs

    async def read(self) -> dict[str, worker_pb2.WorkerStatus]:
        """The gauges of this moment, by worker id."""
        request = worker_pb2.GetStatusRequest()
        return {worker_id: await stub.GetStatus(request) for worker_id, stub in self._stubs.items()}

    async def wait_idle(self, *, timeout_s: float) -> None:
        """Until no request, transfer, reservation or pin is left anywhere. Raises `AssertionError` telling what is."""
        left: list[str] = []
        try:
            async with asyncio.timeout(timeout_s):
                while left := _busy(await self.read()):
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise AssertionError(f"after {timeout_s} s: {', '.join(left)}") from None

    async def wait_busy(self, *, timeout_s: float = 5.0) -> None:
        """Until some worker has something to do."""
        async with asyncio.timeout(timeout_s):
            while not _busy(await self.read()):
                await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def open_gauges(cluster: RunningCluster) -> AsyncIterator[ClusterGauges]:
    """Connect to every registered worker."""
    async with etcd.connect(etcd.EtcdConfig(endpoints=cluster.etcd)) as client:
        workers = await membership.list_workers(client, cluster.cluster)
    async with AsyncExitStack() as stack:
        stubs = {}
        for worker in workers:
            channel = await stack.enter_async_context(open_channel(worker.address))
            stubs[worker.worker_id] = worker_pb2_grpc.WorkerStub(channel)
        yield ClusterGauges(stubs)


def _busy(statuses: dict[str, worker_pb2.WorkerStatus]) -> list[str]:
    left = []
    for worker_id, status in statuses.items():
        gauges = {
            "running": status.num_running_requests,
            "waiting": status.num_waiting_requests,
            "queued tokens": status.num_queued_prompt_tokens,
            "engine KV": status.engine_kv_usage,
            "incoming transfers": status.num_incoming_transfers,
            "outgoing transfers": status.num_outgoing_transfers,
            "reserved slots": status.store.num_reserved,
            "pinned slots": status.store.num_pinned,
        }
        left += [f"{worker_id}: {value:g} {name}" for name, value in gauges.items() if value]
    return left

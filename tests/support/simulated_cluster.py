"""A coordinator's engine over workers that are real but for their model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc.aio

from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.coordinator.worker_pool import WorkerPool
from kvrelay.decode_worker.runner import DecodeRole
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.grpc_options import server_options
from kvrelay.kv_transfer import service as kv_service
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.service import KvTransferService
from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.prefill_worker.runner import PrefillRole
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, worker_pb2_grpc
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.record import WorkerRecord
from kvrelay.worker.running_host import open_host
from kvrelay.worker.service import WorkerService
from kvrelay.worker.status import worker_status
from kvrelay.worker.store_config import StoreConfig
from tests.support.fake_cluster import until

PREFILL, DECODE = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE


@dataclass(slots=True)
class SimulatedWorker:
    info: cluster_pb2.WorkerInfo
    host: WorkerHost
    server: grpc.aio.Server
    service: WorkerService

    async def lose(self) -> None:
        """Its coordinators lose it, now and for good."""
        await self.server.stop(None)


@dataclass(slots=True)
class SimulatedCluster:
    engine: ClusterEngine
    pool: WorkerPool
    workers: list[SimulatedWorker]

    def worker(self, worker_id: str) -> SimulatedWorker:
        """Raises `StopIteration` when there is none."""
        return next(worker for worker in self.workers if worker.info.worker_id == worker_id)

    async def wait_idle(self) -> None:
        """Until nothing of any request is left on a worker, lost or not; times out if something stays."""
        await until(lambda: all(map(is_idle, self.workers)))


@contextlib.asynccontextmanager
async def simulated_worker(
    worker_id: str,
    role: cluster_pb2.Role.ValueType,
    model: str,
    config: SimulatedConfig,
    tracing: Tracing,
    transport: KvTransport = KvTransport.AUTO,
) -> AsyncIterator[SimulatedWorker]:
    """Host, roles and gRPC server of one worker, without a record in etcd."""
    store = StoreConfig(size_bytes=16 << 20, transport=transport)
    async with open_host(SimulatedEngine(config), store, tracing) as host:
        server = grpc.aio.server(options=server_options())
        info = cluster_pb2.WorkerInfo(
            worker_id=worker_id,
            role=role,
            state=cluster_pb2.WORKER_STATE_READY,
            model=model,
            address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}",
            layout=host.info.layout,
            max_model_len_tokens=host.info.max_model_len_tokens,
            incarnation="1",
        )
        host.borrower.address = info.address
        prefill, decode = PrefillRole(host), DecodeRole(host)
        service = WorkerService(WorkerRecord(info), lambda: worker_status(host, worker_id), prefill, decode)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
        push_server = PushServer(host.receiver, host.collectives)
        push_address = f"127.0.0.1:{push_server.start('127.0.0.1:0')}"
        host.collectives.listen("127.0.0.1", "127.0.0.1")
        kv_service.add_to_server(
            KvTransferService(
                host.receiver,
                push_address,
                host.lender.lend,
                maps_memory=host.transport.shares_memory,
                collectives=host.collectives,
            ),
            server,
        )
        await server.start()
        try:
            yield SimulatedWorker(info, host, server, service)
        finally:
            await server.stop(None)
            await asyncio.to_thread(host.collectives.close)
            await asyncio.to_thread(push_server.stop)


@contextlib.asynccontextmanager
async def simulated_cluster(
    front_end: FrontEnd,
    roles: Sequence[cluster_pb2.Role.ValueType] = (PREFILL, DECODE),
    *,
    config: SimulatedConfig | None = None,
    tracing: Tracing | None = None,
    transport: KvTransport = KvTransport.AUTO,
    policy: str = "least-loaded",
) -> AsyncIterator[SimulatedCluster]:
    config = config or SimulatedConfig(time_scale=0.05)
    tracing = tracing or Tracing()
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                simulated_worker(f"w{index}", role, front_end.served_model_name, config, tracing, transport)
            )
            for index, role in enumerate(roles)
        ]
        coordinator = simulated_coordinator(front_end, workers, make_scheduler(policy), tracing=tracing)
        engine, pool = await stack.enter_async_context(coordinator)
        yield SimulatedCluster(engine, pool, workers)


@contextlib.asynccontextmanager
async def simulated_coordinator(
    front_end: FrontEnd,
    workers: Sequence[SimulatedWorker],
    scheduler: Scheduler,
    *,
    index: PrefixIndex | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[tuple[ClusterEngine, WorkerPool]]:
    """One more over the same workers, connected to all of them."""
    pool = WorkerPool("coordinator-1")
    engine = ClusterEngine(front_end, pool, scheduler=scheduler, index=index, tracing=tracing)
    async with pool.running(engine):
        for worker in workers:
            pool.join(worker.info)
        await until(lambda: len(pool.workers()) == len(workers))
        yield engine, pool


def is_idle(worker: SimulatedWorker) -> bool:
    """Whether nothing of any request is left there."""
    status = worker_status(worker.host, worker.info.worker_id)
    store = status.store
    return not (
        status.num_running_requests
        or status.num_waiting_requests
        or status.num_queued_prompt_tokens
        or status.engine_kv_usage
        or status.num_incoming_transfers
        or status.num_outgoing_transfers
        or store.num_pinned
        or store.num_reserved
    )

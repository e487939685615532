"""How does a worker leave the cluster without a request being lost?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from kvrelay.client.roles import StillBusyError, WorkerSilentError, check_not_last, find
from kvrelay.etcd import EtcdClient, EtcdConfig, connect
from kvrelay.grpc_options import open_channel
from kvrelay.membership import list_workers
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

_POLL_S = 0.2
_RPC_TIMEOUT_S = 10.0
_LEAVE_S = 10.0
"""Beyond the time that its requests have: to end its engine and to take its leave from etcd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """What is asked for."""

    worker_id: str
    drain_s: float = 60.0
    """How long its requests may go on there; before that is over they go on at other workers."""
    force: bool = False
    """Also if nobody is left to decode."""


async def drain(etcd: Sequence[str], cluster: str, request: Drain, on_progress: Callable[[int], None]) -> None:
    """Have a worker leave, and wait until it has left.

    `on_progress` hears how many requests it still has. Raises `EtcdError`, `RoleRefusedError` when that makes no sense,
    `WorkerSilentError`, and `StillBusyError` when it is there although its time is over.
    """
    async with connect(EtcdConfig(endpoints=list(etcd))) as client:
        worker = _leaver(request, await list_workers(client, cluster))
        async with open_channel(worker.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                await stub.Drain(worker_pb2.DrainRequest(drain_s=request.drain_s), timeout=_RPC_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise WorkerSilentError(
                    f"worker {worker.worker_id} at {worker.address} does not answer: {error.details()}"
                ) from None
            try:
                async with asyncio.timeout(request.drain_s + _LEAVE_S):
                    while await _is_listed(client, cluster, worker):
                        await _tell(stub, on_progress)
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                raise StillBusyError(
                    f"{worker.worker_id} is still in the cluster's list {_LEAVE_S:g} s after the time of its requests;"
                    " its log says why"
                ) from None


def _leaver(request: Drain, workers: Sequence[cluster_pb2.WorkerInfo]) -> cluster_pb2.WorkerInfo:
    """Raises `RoleRefusedError`."""
    worker = find(request.worker_id, workers)
    if not request.force:
        check_not_last(worker, workers)
    return worker


async def _is_listed(client: EtcdClient, cluster: str, worker: cluster_pb2.WorkerInfo) -> bool:
    """Whether this very process is; its successor does not count."""
    return any(other.incarnation == worker.incarnation for other in await list_workers(client, cluster))


async def _tell(stub: worker_pb2_grpc.WorkerAsyncStub, on_progress: Callable[[int], None]) -> None:
    try:
        status = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=_RPC_TIMEOUT_S)
    except grpc.aio.AioRpcError:  # It closes its port before it leaves the list.
        return
    on_progress(status.num_prefill_jobs + max(status.num_decode_jobs, status.num_incoming_transfers))

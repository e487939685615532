"""How does a worker get another role while it serves?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import grpc

from kvrelay.client.workers import role_name
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.grpc_options import open_channel
from kvrelay.membership import list_workers
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

_POLL_S = 0.2
_SETTLED_S = 1.0
"""So long must the old role's work have been over: who has not heard yet of the new role may send some until then."""
_NEW_ROLE_TIMEOUT_S = 10.0

PREFILL, DECODE, BOTH = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_BOTH


class RoleRefusedError(Exception):
    """The change makes no sense; the message says why, and what to do."""


class WorkerSilentError(Exception):
    """The worker does not answer, or not as it should."""


class StillBusyError(Exception):
    """The role has changed; what the worker had under the old one goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChange:
    """What is asked for."""

    worker_id: str
    role: cluster_pb2.Role.ValueType
    force: bool = False
    """Also if nobody is left to decode."""
    timeout_s: float = 60.0
    """For the old role's work to end."""


async def set_role(
    etcd: Sequence[str], cluster: str, change: RoleChange, on_progress: Callable[[int], None]
) -> cluster_pb2.Role.ValueType:
    """Change the role, wait until what the worker had under the old one is done, and return the old role.

    `on_progress` hears how many requests that still are. Raises `EtcdError`, `RoleRefusedError`, `WorkerSilentError`,
    `StillBusyError`.
    """
    async with connect(EtcdConfig(endpoints=list(etcd))) as client:
        workers = await list_workers(client, cluster)
    worker = checked(change, workers)
    async with open_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            await stub.SetRole(worker_pb2.SetRoleRequest(role=change.role), timeout=_NEW_ROLE_TIMEOUT_S)
            async with asyncio.timeout(change.timeout_s):
                await _wait_done(stub, worker.role, change.role, on_progress)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise RoleRefusedError(error.details()) from None
            raise WorkerSilentError(
                f"worker {change.worker_id} at {worker.address} does not answer: {error.details()}"
            ) from None
        except TimeoutError:
            raise StillBusyError(
                f"{change.worker_id} has role {role_name(change.role)} now, but it still works on requests of the old"
                f" one after {change.timeout_s:g} s; it finishes them"
            ) from None
    return worker.role


def checked(change: RoleChange, workers: Collection[cluster_pb2.WorkerInfo]) -> cluster_pb2.WorkerInfo:
    """The record of the worker that is meant. Raises `RoleRefusedError` for a change that makes no sense."""
    worker = find(change.worker_id, workers)
    if worker.state == cluster_pb2.WORKER_STATE_DRAINING:
        raise RoleRefusedError(f"worker {change.worker_id} drains: it leaves the cluster, so it takes no other role")
    if change.role == PREFILL and not change.force:
        check_not_last(worker, workers)
    return worker


def find(worker_id: str, workers: Collection[cluster_pb2.WorkerInfo]) -> cluster_pb2.WorkerInfo:
    """The record of a worker. Raises `RoleRefusedError` when there is none."""
    by_id = {worker.worker_id: worker for worker in workers}
    if worker_id not in by_id:
        known = ", ".join(sorted(by_id)) or "none at all"
        raise RoleRefusedError(f"there is no worker {worker_id!r}; there are: {known}")
    return by_id[worker_id]


def check_not_last(worker: cluster_pb2.WorkerInfo, workers: Collection[cluster_pb2.WorkerInfo]) -> None:
    """Raises `RoleRefusedError` when nobody would decode for its model without this worker."""
    others = [
        other
        for other in workers
        if other is not worker
        and other.model == worker.model
        and other.role in (DECODE, BOTH)
        and other.state == cluster_pb2.WORKER_STATE_READY
    ]
    if worker.role != PREFILL and not others:
        raise RoleRefusedError(
            f"{worker.worker_id} is the last worker that decodes for model {worker.model!r}: without it nothing could"
            " be served; add another one first, or use --force"
        )


async def _wait_done(
    stub: worker_pb2_grpc.WorkerAsyncStub,
    old: cluster_pb2.Role.ValueType,
    new: cluster_pb2.Role.ValueType,
    on_progress: Callable[[int], None],
) -> None:
    loop = asyncio.get_running_loop()
    done_since = loop.time()
    while loop.time() < done_since + _SETTLED_S:
        status = await stub.GetStatus(worker_pb2.GetStatusRequest())
        if num_left := num_old(status, old, new):
            done_since = loop.time()
        on_progress(num_left)
        await asyncio.sleep(_POLL_S)


def num_old(status: worker_pb2.WorkerStatus, old: cluster_pb2.Role.ValueType, new: cluster_pb2.Role.ValueType) -> int:
    """Requests that the worker has under a role that it has no more; those whose KV blocks come in count, too."""
    left = 0
    if old in (PREFILL, BOTH) and new == DECODE:
        left += status.num_prefill_jobs
    if old in (DECODE, BOTH) and new == PREFILL:
        left += max(status.num_decode_jobs, status.num_incoming_transfers)
    return left

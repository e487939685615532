"""Who is in the cluster, and how busy is everybody? The records in etcd, and each worker's own gauges."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from kvrelay.etcd import EtcdConfig, connect
from kvrelay.grpc_options import open_channel
from kvrelay.membership import list_workers
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

_ROLE_ORDER = {"prefill": 0, "both": 1, "decode": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """One worker. The gauges are None where it did not answer in time."""

    worker_id: str
    role: str
    model: str
    address: str
    state: str
    """`ready` or `draining` as registered, `silent` when it does not answer."""
    engine: str
    version: str
    started_unix_ns: int
    num_running_requests: int | None = None
    num_waiting_requests: int | None = None
    num_queued_prompt_tokens: int | None = None
    engine_kv_usage: float | None = None
    """Share of the engine's own KV blocks in use, 0..1."""
    num_slots: int | None = None
    """Blocks that the host block store holds."""
    num_used_slots: int | None = None
    """Of those, written, pinned or lent to the engine; the rest is free or cache."""
    num_cached_slots: int | None = None
    disk_bytes: int | None = None
    """Room on disk for blocks that leave the store; 0 for none."""
    num_disk_blocks: int | None = None


async def collect_workers(etcd: Sequence[str], cluster: str, timeout_s: float) -> list[WorkerRow]:
    """All registered workers by role and id, each asked for its gauges for at most `timeout_s`.

    Raises `EtcdError` when etcd does not answer.
    """
    asked = await ask_workers(etcd, cluster, timeout_s)
    rows = [_row(info, status) for info, status in asked]
    return sorted(rows, key=lambda row: (_ROLE_ORDER.get(row.role, len(_ROLE_ORDER)), row.worker_id))


async def ask_workers(
    etcd: Sequence[str], cluster: str, timeout_s: float
) -> list[tuple[cluster_pb2.WorkerInfo, worker_pb2.WorkerStatus | None]]:
    """The records of all workers, and what each says of itself; None for one that does not answer in time.

    Raises `EtcdError` when etcd does not answer.
    """
    async with connect(EtcdConfig(endpoints=list(etcd), timeout_s=max(timeout_s, 2.0))) as client:
        infos = await list_workers(client, cluster)
    statuses = await asyncio.gather(*(_status(info.address, timeout_s) for info in infos))
    return list(zip(infos, statuses, strict=True))


def role_name(role: cluster_pb2.Role.ValueType) -> str:
    """As people write it."""
    return cluster_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _row(info: cluster_pb2.WorkerInfo, status: worker_pb2.WorkerStatus | None) -> WorkerRow:
    registered = cluster_pb2.WorkerState.Name(info.state).removeprefix("WORKER_STATE_").lower()
    row = WorkerRow(
        worker_id=info.worker_id,
        role=role_name(info.role),
        model=info.model,
        address=info.address,
        state=registered if status else "silent",
        engine=info.engine,
        version=info.version,
        started_unix_ns=info.started_unix_ns,
    )
    if status is None:
        return row
    store = status.store
    return dataclasses.replace(
        row,
        num_running_requests=status.num_running_requests,
        num_waiting_requests=status.num_waiting_requests,
        num_queued_prompt_tokens=status.num_queued_prompt_tokens,
        engine_kv_usage=status.engine_kv_usage,
        num_slots=store.num_slots,
        num_used_slots=store.num_reserved + store.num_pinned + store.num_granted,
        num_cached_slots=store.num_evictable,
        disk_bytes=store.disk_bytes,
        num_disk_blocks=store.num_disk_blocks,
    )


async def _status(address: str, timeout_s: float) -> worker_pb2.WorkerStatus | None:
    async with open_channel(address) as channel:
        try:
            return await worker_pb2_grpc.WorkerStub(channel).GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return None

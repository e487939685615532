"""Under which keys are the records, and what is in them now?"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from kvrelay.etcd import EtcdClient
from kvrelay.etcd.rpc_pb2 import KeyValue
from kvrelay.v1 import cluster_pb2

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT", bound=Message)


def workers_prefix(cluster: str) -> bytes:
    """Raises `ValueError` for a cluster name with a slash."""
    return _prefix(cluster, "workers")


def coordinators_prefix(cluster: str) -> bytes:
    """Raises `ValueError` for a cluster name with a slash."""
    return _prefix(cluster, "coordinators")


def worker_key(cluster: str, worker_id: str) -> bytes:
    return workers_prefix(cluster) + _checked("worker id", worker_id).encode()


def coordinator_key(cluster: str, coordinator_id: str) -> bytes:
    return coordinators_prefix(cluster) + _checked("coordinator id", coordinator_id).encode()


def chores_key(cluster: str) -> bytes:
    """Who does what only one coordinator of the cluster must do. Raises `ValueError` like `workers_prefix`."""
    return _prefix(cluster, "leaders") + b"chores"


def prefix_logs_prefix(cluster: str) -> bytes:
    """Of the logs in which workers say what blocks they have. Raises `ValueError` like `workers_prefix`."""
    return _prefix(cluster, "prefix")


def prefix_delta_key(cluster: str, worker_id: str, lease_id: int, sequence: int) -> bytes:
    """Of one delta in a worker's log."""
    worker = _checked("worker id", worker_id)
    return prefix_logs_prefix(cluster) + f"{worker}/{lease_id:x}/{sequence:08x}".encode()


async def list_workers(client: EtcdClient, cluster: str) -> list[cluster_pb2.WorkerInfo]:
    """All workers at this moment, by id. Raises `EtcdError`."""
    listing = await client.list_prefix(workers_prefix(cluster))
    return list(decode_all(listing.entries, cluster_pb2.WorkerInfo))


async def list_coordinators(client: EtcdClient, cluster: str) -> list[cluster_pb2.CoordinatorInfo]:
    """All coordinators at this moment, by id. Raises `EtcdError`."""
    listing = await client.list_prefix(coordinators_prefix(cluster))
    return list(decode_all(listing.entries, cluster_pb2.CoordinatorInfo))


def decode(entry: KeyValue, record_type: type[RecordT]) -> RecordT | None:
    """The record in an entry; None, and a line in the log, for bytes that are not one."""
    try:
        return record_type.FromString(entry.value)
    except DecodeError:
        logger.error("the value of %s is not a %s", entry.key.decode(errors="replace"), record_type.__name__)
        return None


def decode_all(entries: Iterable[KeyValue], record_type: type[RecordT]) -> Iterable[RecordT]:
    """The readable ones."""
    return (record for entry in entries if (record := decode(entry, record_type)) is not None)


def _prefix(cluster: str, kind: str) -> bytes:
    return f"/kvrelay/{_checked('cluster name', cluster)}/{kind}/".encode()


def _checked(what: str, name: str) -> str:
    if not name or "/" in name:
        raise ValueError(f"{what} {name!r} must not be empty and must not contain a slash")
    return name

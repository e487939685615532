"""When can a cluster on this machine take requests?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from urllib.parse import urlsplit

from kvrelay.etcd import EtcdConfig, connect
from kvrelay.membership import follow_coordinators, follow_workers
from kvrelay.v1 import cluster_pb2

_POLL_S = 0.2
_ANSWER_TIMEOUT_S = 2.0


class Presence:
    """Which of the expected processes are registered. Told by membership, in the event loop."""

    def __init__(self, expected: Collection[str], on_registered: Callable[[str], None]) -> None:
        self._expected = set(expected)
        self._on_registered = on_registered
        self._present: dict[str, cluster_pb2.WorkerInfo | cluster_pb2.CoordinatorInfo] = {}
        self._complete = asyncio.Event()

    def join(self, record: cluster_pb2.WorkerInfo | cluster_pb2.CoordinatorInfo, /) -> None:
        name = record.worker_id if isinstance(record, cluster_pb2.WorkerInfo) else record.coordinator_id
        if name in self._expected:
            self._present[name] = record
            self._on_registered(name)
            if self._present.keys() == self._expected:
                self._complete.set()

    def update(self, record: cluster_pb2.WorkerInfo | cluster_pb2.CoordinatorInfo, /) -> None:
        """A process that took its predecessor's place before that one's lease ended counts as well."""
        self.join(record)

    def leave(self, member_id: str, /) -> None:
        self._present.pop(member_id, None)
        if member_id in self._expected:
            self._complete.clear()

    def own_http_ports(self) -> list[int]:
        """Of the coordinators that are there: where each of them answers and no other does."""
        coordinators = [info for info in self._present.values() if isinstance(info, cluster_pb2.CoordinatorInfo)]
        return [port for info in coordinators if (port := urlsplit(info.own_http_url).port) is not None]

    async def wait_complete(self) -> None:
        """Until all are there at the same time."""
        await self._complete.wait()


async def follow_cluster(etcd: Collection[str], cluster: str, presence: Presence) -> None:
    """Keep `presence` up to date until cancelled. What etcd still knows of an earlier run leaves by itself."""
    async with connect(EtcdConfig(endpoints=list(etcd))) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(follow_workers(client, cluster, presence))
        tasks.create_task(follow_coordinators(client, cluster, presence))


async def etcd_version(etcd: Collection[str]) -> str:
    """Of the endpoint that answers. Raises `EtcdError`."""
    async with connect(EtcdConfig(endpoints=list(etcd))) as client:
        return (await client.status()).version


async def wait_listening(address: str) -> None:
    """Until somebody accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            return
        await asyncio.sleep(_POLL_S / 4)


async def wait_ready(http_url: str) -> None:
    """Until the coordinator's `/ready` answers 200."""
    while True:
        if await _answers_200(http_url):
            return
        await asyncio.sleep(_POLL_S)


async def _answers_200(http_url: str) -> bool:
    address = urlsplit(http_url)
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(f"GET /ready HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.split()[1:2] == [b"200"]

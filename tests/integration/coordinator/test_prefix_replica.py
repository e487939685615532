"""Indexes of two coordinators hold what the workers have, with a real etcd, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Never

import pytest_asyncio

from kvrelay.block_hash import HASH_BYTES
from kvrelay.coordinator.prefix_index.follow import PrefixReplica
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.keys import prefix_keys
from kvrelay.etcd import EtcdClient, EtcdConfig, Lease, connect
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.held_blocks import HeldBlocks
from kvrelay.membership import prefix_logs_prefix, register, worker_key
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.prefix_publisher import PrefixPublisher, PublisherConfig
from tests.support.etcd_process import EtcdProcess, etcd_process
from tests.support.eventually import eventually
from tests.support.fault_proxy import TcpFault, TcpProxy

CLUSTER = "test"
NAMES = [hashlib.sha256(bytes([number % 256, number // 256])).digest()[:HASH_BYTES] for number in range(600)]
SETTLED_S = 1.0
"""From the last change until all coordinators know."""
AWAY_S = 20.0
"""The same where a lease has to end first."""
SHORT_LOGS = PublisherConfig(max_deltas=4, min_replaced_blocks=50)


class Worker:
    """Blocks that come and go, and their log."""

    def __init__(self, worker_id: str, client: EtcdClient) -> None:
        self.worker_id = worker_id
        self._client = client
        self._store = BlockStore(200)
        self._random = random.Random(worker_id)
        self.num_ended_logs = 0
        self._publisher = PrefixPublisher(client, CLUSTER, worker_id, HeldBlocks(self._store), SHORT_LOGS)

    @property
    def hashes(self) -> set[bytes]:
        return set(self._store.hashes)

    @contextlib.asynccontextmanager
    async def registered(self) -> AsyncIterator[Worker]:
        async with register(self._client, worker_key(CLUSTER, self.worker_id), ttl_s=2) as registration:
            registration.accompany(self._write_log)
            registration.put(cluster_pb2.WorkerInfo(worker_id=self.worker_id))
            yield self

    async def _write_log(self, lease: Lease) -> Never:
        try:
            await self._publisher.run(lease)
        finally:
            self.num_ended_logs += 1

    def change(self) -> None:
        for slot in self._store.reserve(10):
            self._store.unpin([self._store.commit(slot, self._random.choice(NAMES))])

    async def work(self, num_changes: int = 60) -> None:
        for _ in range(num_changes):
            self.change()
            await asyncio.sleep(0.02)


def holdings(index: PrefixIndex) -> dict[str, set[bytes]]:
    """Which workers have which blocks, as the index says."""
    found: dict[str, set[bytes]] = {}
    for name in NAMES:
        for worker_id in index.match(prefix_keys([name])):
            found.setdefault(worker_id, set()).add(name)
    return found


async def until_right(replicas: Sequence[PrefixReplica], workers: Sequence[Worker], within_s: float) -> None:
    expected = {worker.worker_id: worker.hashes for worker in workers if worker.hashes}
    await eventually(
        lambda: all(holdings(replica.index) == expected for replica in replicas),
        "the indexes hold what the workers have",
        timeout_s=within_s,
    )


@pytest_asyncio.fixture
async def etcd() -> AsyncIterator[EtcdProcess]:
    async with etcd_process() as process:
        yield process


@contextlib.asynccontextmanager
async def replica(endpoint: str, absence_grace_s: float = 10.0) -> AsyncIterator[PrefixReplica]:
    """Of one coordinator, with a client of its own."""
    followed = PrefixReplica(PrefixIndex())
    async with connect(EtcdConfig(endpoints=[endpoint])) as client, asyncio.TaskGroup() as tasks:
        following = tasks.create_task(followed.follow(client, CLUSTER, absence_grace_s))
        try:
            yield followed
        finally:
            following.cancel()


@contextlib.asynccontextmanager
async def cluster(etcd: EtcdProcess, *worker_ids: str) -> AsyncIterator[tuple[list[PrefixReplica], list[Worker]]]:
    """Two coordinators, and workers that are registered."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        replicas = [await enter(replica(etcd.endpoint)) for _ in range(2)]
        workers = []
        for worker_id in worker_ids:
            client = await enter(connect(EtcdConfig(endpoints=[etcd.endpoint])))
            workers.append(await enter(Worker(worker_id, client).registered()))
        yield replicas, workers


async def test_they_agree_within_a_second_after_the_load(etcd: EtcdProcess) -> None:
    async with cluster(etcd, "a", "b", "c") as (replicas, workers):
        await asyncio.gather(*(worker.work() for worker in workers))
        await until_right(replicas, workers, SETTLED_S)
        figures = replicas[0].figures()
        assert figures.num_entries == sum(len(worker.hashes) for worker in workers)
        assert figures.num_rebuilds == 0
        assert 0 <= figures.lag_s < SETTLED_S
        assert figures.num_writes >= 10
        assert figures.writes_per_s > 0
        async with replica(etcd.endpoint) as late:
            await until_right([late], workers, SETTLED_S)
            await eventually(lambda: late.figures().num_etcd_keys == replicas[0].figures().num_etcd_keys)
            assert late.figures().etcd_bytes == replicas[0].figures().etcd_bytes


async def test_they_agree_after_etcd_was_killed_and_restarted(etcd: EtcdProcess) -> None:
    async with cluster(etcd, "a", "b") as (replicas, workers):
        await asyncio.gather(*(worker.work(20) for worker in workers))
        await until_right(replicas, workers, SETTLED_S)
        etcd.kill()
        before = [holdings(each.index) for each in replicas]
        await asyncio.gather(*(worker.work(20) for worker in workers))
        assert [holdings(each.index) for each in replicas] == before, "while etcd is away the last known state stays"
        await etcd.start()
        await asyncio.gather(*(worker.work(20) for worker in workers))
        await until_right(replicas, workers, AWAY_S)
        await asyncio.gather(*(worker.work(20) for worker in workers))
        await until_right(replicas, workers, SETTLED_S)


async def test_a_lease_that_ends_while_etcd_is_away_is_replaced_by_another_log(etcd: EtcdProcess) -> None:
    async with cluster(etcd, "a") as (replicas, workers):
        workers[0].change()
        await until_right(replicas, workers, SETTLED_S)
        etcd.kill()
        workers[0].change()
        await eventually(lambda: workers[0].num_ended_logs)
        await etcd.start()
        await until_right(replicas, workers, AWAY_S)
        workers[0].change()
        await until_right(replicas, workers, SETTLED_S)


async def test_another_store_is_filled_again_and_nothing_is_forgotten_meanwhile(etcd: EtcdProcess) -> None:
    async with cluster(etcd, "a") as (replicas, workers):
        await workers[0].work(5)
        await until_right(replicas, workers, SETTLED_S)
        await etcd.stop_for_good()
        await etcd.start()
        await eventually(lambda: replicas[0].figures().num_rebuilds == 1)
        await until_right(replicas, workers, SETTLED_S)
        workers[0].change()
        await until_right(replicas, workers, AWAY_S)


class Line:
    """A way to etcd that can be cut."""

    def __init__(self, target: str) -> None:
        self._proxy = TcpProxy(target, TcpFault(random.Random(0), (1 << 40, 2 << 40)))
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self) -> None:
        """The first time at a free port, then at the same one."""
        self._server = await asyncio.start_server(self._proxy.serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._proxy.end()


async def test_everything_is_read_again_after_a_compaction(etcd: EtcdProcess) -> None:
    line = Line(etcd.endpoint)
    await line.open()
    async with cluster(etcd, "a", "b") as (replicas, workers), replica(f"127.0.0.1:{line.port}") as cut_off:
        await asyncio.gather(*(worker.work(10) for worker in workers))
        await until_right([*replicas, cut_off], workers, SETTLED_S)
        await line.cut()
        before = holdings(cut_off.index)
        await asyncio.gather(*(worker.work(40) for worker in workers))
        async with connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
            await client.compact(await client.put(b"/other", b""))
        assert holdings(cut_off.index) == before
        await line.open()
        await until_right([*replicas, cut_off], workers, AWAY_S)
        assert cut_off.figures().num_rebuilds == 1
        workers[0].change()
        await until_right([*replicas, cut_off], workers, SETTLED_S)
        await line.cut()


async def test_a_worker_that_leaves_takes_its_blocks_along(etcd: EtcdProcess) -> None:
    async with cluster(etcd, "a") as (replicas, workers), connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        async with Worker("b", client).registered() as leaving:
            workers[0].change()
            leaving.change()
            await until_right(replicas, [*workers, leaving], SETTLED_S)
        await until_right(replicas, workers, SETTLED_S)
        keys = [entry.key for entry in (await client.list_prefix(prefix_logs_prefix(CLUSTER))).entries]
        assert keys
        assert all(key.startswith(prefix_logs_prefix(CLUSTER) + b"a/") for key in keys)


async def test_whoever_does_not_come_back_is_forgotten_after_the_grace(etcd: EtcdProcess) -> None:
    async with replica(etcd.endpoint, absence_grace_s=0.5) as followed:
        async with (
            connect(EtcdConfig(endpoints=[etcd.endpoint])) as client,
            Worker("a", client).registered() as worker,
        ):
            worker.change()
            await until_right([followed], [worker], SETTLED_S)
            await etcd.stop_for_good()
        assert holdings(followed.index) == {"a": worker.hashes}
        await etcd.start()
        await eventually(lambda: not holdings(followed.index))

"""Workers join, change, leave and vanish, with a real etcd."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvrelay.etcd import EtcdClient
from kvrelay.membership import (
    coordinator_key,
    follow_workers,
    list_coordinators,
    list_workers,
    register,
    worker_key,
)
from kvrelay.v1 import cluster_pb2
from tests.support.etcd_process import EtcdProcess
from tests.support.recording_members import RecordingMembers

CLUSTER = "test"
KEY = worker_key(CLUSTER, "w")

_HOLDER = """
import asyncio, sys
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.membership import register, worker_key
from kvrelay.v1 import cluster_pb2

async def main():
    async with connect(EtcdConfig(endpoints=[sys.argv[1]])) as client:
        info = cluster_pb2.WorkerInfo(worker_id="w")
        async with register(client, worker_key("test", "w"), info, ttl_s=2) as registration:
            await registration.wait_written()
            print("written", flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


def _worker(state: cluster_pb2.WorkerState.ValueType = cluster_pb2.WORKER_STATE_READY) -> cluster_pb2.WorkerInfo:
    return cluster_pb2.WorkerInfo(worker_id="w", address="127.0.0.1:1", state=state)


@asynccontextmanager
async def _following(client: EtcdClient, *, absence_grace_s: float = 10.0) -> AsyncIterator[RecordingMembers]:
    members = RecordingMembers()
    following = follow_workers(
        client, CLUSTER, members, absence_grace_s=absence_grace_s, on_connected=members.on_connected
    )
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(following)
        await members.until(lambda: members.connected is True)
        yield members
        task.cancel()


async def test_join_update_leave(client: EtcdClient) -> None:
    async with _following(client) as members:
        async with register(client, KEY, _worker()) as registration:
            await members.until(lambda: "w" in members.current)
            await registration.update(_worker(cluster_pb2.WORKER_STATE_DRAINING))
            entry = await client.get(KEY)
            assert entry is not None
            assert cluster_pb2.WorkerInfo.FromString(entry.value) == _worker(cluster_pb2.WORKER_STATE_DRAINING)
            await members.until(lambda: members.current["w"].state == cluster_pb2.WORKER_STATE_DRAINING)
        await members.until(lambda: not members.current)
    assert members.calls == [("join", "w"), ("update", "w"), ("leave", "w")]
    assert not (await client.list_prefix(b"/")).entries


async def test_a_killed_process_vanishes_within_its_time(client: EtcdClient, etcd: EtcdProcess) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _HOLDER, etcd.endpoint, stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"written\n"
    async with _following(client) as members:
        await members.until(lambda: "w" in members.current)
        os.kill(holder.pid, signal.SIGKILL)
        await holder.wait()
        await members.until(lambda: not members.current, timeout_s=4.0)
    assert not (await client.list_prefix(b"/")).entries


async def test_nobody_leaves_while_etcd_is_away(client: EtcdClient, etcd: EtcdProcess) -> None:
    async with _following(client) as members, register(client, KEY, _worker(), ttl_s=1) as registration:
        await members.until(lambda: "w" in members.current)
        etcd.kill()
        await members.until(lambda: members.connected is False)
        await etcd.start()
        await members.until(lambda: members.connected is True)
        await registration.update(_worker(cluster_pb2.WORKER_STATE_DRAINING))
        await members.until(lambda: members.calls[-1] == ("update", "w"))
        assert members.calls == [("join", "w"), ("update", "w")]


async def test_a_lost_lease_is_replaced(client: EtcdClient) -> None:
    async with _following(client) as members, register(client, KEY, _worker(), ttl_s=1) as registration:
        await registration.wait_written()
        entry = await client.get(KEY)
        assert entry is not None
        await client.revoke_lease(entry.lease)
        await members.until(lambda: members.calls == [("join", "w"), ("leave", "w"), ("join", "w")])
        replaced = await client.get(KEY)
        assert replaced is not None
        assert replaced.lease not in (0, entry.lease)


async def test_another_store_is_filled_again_and_nobody_leaves(client: EtcdClient, etcd: EtcdProcess) -> None:
    async with _following(client) as members, register(client, KEY, _worker(), ttl_s=2):
        await members.until(lambda: "w" in members.current)
        await client.put(b"/other", b"x")
        await etcd.stop_for_good()
        await members.until(lambda: members.connected is False)
        await etcd.start()
        await members.until(lambda: members.connected is True)
        entries = await _until_listed(client)
        assert [worker.worker_id for worker in entries] == ["w"]
        assert members.calls == [("join", "w")]


async def test_whoever_does_not_come_back_has_left_after_the_grace(client: EtcdClient, etcd: EtcdProcess) -> None:
    async with _following(client, absence_grace_s=0.5) as members:
        async with register(client, KEY, _worker(), ttl_s=2):
            await members.until(lambda: "w" in members.current)
            await etcd.stop_for_good()
        await members.until(lambda: members.connected is False)
        assert members.current.keys() == {"w"}
        await etcd.start()
        await members.until(lambda: not members.current)


async def test_the_list_is_read_again_after_a_compaction(client: EtcdClient, etcd: EtcdProcess) -> None:
    async with _following(client) as members:
        etcd.kill()
        await members.until(lambda: members.connected is False)
        await etcd.start()
        await client.put(KEY, _worker().SerializeToString())
        revision = await client.put(b"/other", b"x")
        await client.compact(revision)
        await members.until(lambda: "w" in members.current)
        await client.delete(KEY)
        await members.until(lambda: not members.current)


async def test_nothing_is_registered_before_there_is_a_record(client: EtcdClient) -> None:
    async with register(client, KEY) as registration:
        assert not (await client.list_prefix(b"/")).entries
        registration.put(_worker())
        await registration.wait_written()
        assert await list_workers(client, CLUSTER) == [_worker()]
    assert not (await client.list_prefix(b"/")).entries


async def test_registering_does_not_wait_for_etcd(client: EtcdClient, etcd: EtcdProcess) -> None:
    etcd.kill()
    async with register(client, KEY, _worker()) as registration:
        await etcd.start()
        async with asyncio.timeout(20):
            await registration.wait_written()


async def test_lists(client: EtcdClient) -> None:
    coordinator = cluster_pb2.CoordinatorInfo(coordinator_id="c", http_url="http://127.0.0.1:8000")
    async with (
        register(client, KEY, _worker()) as worker,
        register(client, coordinator_key(CLUSTER, "c"), coordinator) as other,
    ):
        await worker.wait_written()
        await other.wait_written()
        assert await list_workers(client, CLUSTER) == [_worker()]
        assert await list_coordinators(client, CLUSTER) == [coordinator]
        assert await list_workers(client, "another") == []


async def _until_listed(client: EtcdClient) -> list[cluster_pb2.WorkerInfo]:
    async with asyncio.timeout(20):
        while not (workers := await list_workers(client, CLUSTER)):
            continue
    return workers

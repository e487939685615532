"""The client against a real server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from kvrelay import keeper
from kvrelay.etcd import (
    EtcdClient,
    EtcdConfig,
    EtcdError,
    EtcdUnavailableError,
    LeaseLostError,
    LeaseNotFoundError,
    WatchOutdatedError,
    connect,
)
from kvrelay.etcd.rpc_pb2 import Compare, Event, PutRequest, RequestOp, TxnRequest
from kvrelay.etcd.server import EtcdServerError, run_etcd
from tests.support.etcd_process import EtcdProcess


async def test_put_get_delete(client: EtcdClient) -> None:
    assert await client.get(b"/a") is None
    revision = await client.put(b"/a", b"1")
    entry = await client.get(b"/a")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"1", revision)
    assert await client.delete(b"/a")
    assert not await client.delete(b"/a")


async def test_a_listing_is_of_one_revision_whatever_its_pages(client: EtcdClient) -> None:
    for number in range(10):
        await client.put(b"/p/%d" % number, b"x")
    await client.put(b"/q", b"x")
    listing = await client.list_prefix(b"/p/", page_keys=3)
    assert [entry.key for entry in listing.entries] == [b"/p/%d" % number for number in range(10)]
    assert listing.revision == listing.entries[-1].mod_revision + 1
    assert await client.delete_prefix(b"/p/") == 10


async def test_a_transaction_compares(client: EtcdClient) -> None:
    absent = Compare(key=b"/t", target=Compare.CREATE, create_revision=0)
    request = TxnRequest(compare=[absent], success=[RequestOp(request_put=PutRequest(key=b"/t", value=b"1"))])
    assert (await client.txn(request)).succeeded
    assert not (await client.txn(request)).succeeded


async def test_a_lease_takes_its_keys_along(client: EtcdClient) -> None:
    lease = await client.grant_lease(30)
    await client.put(b"/l", b"1", lease_id=lease.lease_id)
    await client.revoke_lease(lease.lease_id)
    await client.revoke_lease(lease.lease_id)
    assert await client.get(b"/l") is None
    with pytest.raises(LeaseNotFoundError):
        await client.put(b"/l", b"1", lease_id=lease.lease_id)


async def test_a_kept_lease_outlives_its_time_and_an_unkept_one_does_not(client: EtcdClient) -> None:
    kept, unkept = await client.grant_lease(1), await client.grant_lease(1)
    await client.put(b"/l/kept", b"1", lease_id=kept.lease_id)
    revision = await client.put(b"/l/unkept", b"1", lease_id=unkept.lease_id)
    task = asyncio.create_task(client.keep_alive(kept))
    async with asyncio.timeout(10), aclosing(client.watch_prefix(b"/l/", start_revision=revision + 1)) as events:
        (event,) = await anext(events)
    assert (event.type, event.kv.key) == (Event.DELETE, b"/l/unkept")
    assert await client.get(b"/l/kept") is not None
    await client.revoke_lease(kept.lease_id)
    with pytest.raises(LeaseLostError):
        await task


async def test_a_lease_is_lost_when_etcd_is_away_for_as_long(client: EtcdClient, etcd: EtcdProcess) -> None:
    lease = await client.grant_lease(2)
    task = asyncio.create_task(client.keep_alive(lease))
    etcd.kill()
    loop = asyncio.get_running_loop()
    with pytest.raises(LeaseLostError):
        await task
    assert lease.ttl_s <= loop.time() - lease.granted_at < lease.ttl_s + 3


async def test_a_watch_goes_on_through_a_kill_and_a_restart(client: EtcdClient, etcd: EtcdProcess) -> None:
    first = await client.put(b"/w/0", b"")
    seen: list[bytes] = []

    async def collect() -> None:
        async with aclosing(client.watch_prefix(b"/w/", start_revision=first)) as batches:
            async for batch in batches:
                seen.extend(event.kv.key for event in batch)
                if seen[-1] == b"/w/299":
                    return

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(collect())
        for number in range(1, 300):
            if number in (100, 200):
                etcd.kill()
                await etcd.start()
            await client.put(b"/w/%d" % number, b"")
    assert list(dict.fromkeys(seen)) == [b"/w/%d" % number for number in range(300)]
    assert len(seen) - 300 <= 2, "only a put that was repeated may be seen twice"


async def test_a_compacted_revision_cannot_be_watched(client: EtcdClient) -> None:
    revision = 0
    for _ in range(5):
        revision = await client.put(b"/c", b"")
    await client.compact(revision)
    with pytest.raises(WatchOutdatedError, match="compacted"):
        await _first(client.watch_prefix(b"/c", start_revision=2))


async def test_another_store_at_the_same_address_is_noticed(client: EtcdClient, etcd: EtcdProcess) -> None:
    for _ in range(10):
        await client.put(b"/c", b"")
    listing = await client.list_prefix(b"/c")
    watch = client.watch_prefix(b"/c", start_revision=listing.revision + 1, cluster_id=listing.cluster_id)
    task = asyncio.create_task(_first(watch))
    await etcd.stop_for_good()
    await etcd.start()
    with pytest.raises(WatchOutdatedError, match="another store"):
        await task


async def test_a_dead_endpoint_is_passed_over(etcd: EtcdProcess) -> None:
    async with connect(EtcdConfig(endpoints=["127.0.0.1:1", etcd.endpoint, "127.0.0.1:2"])) as client:
        for _ in range(5):
            await client.put(b"/a", b"1")


async def test_a_silent_endpoint_is_passed_over(etcd: EtcdProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        config = EtcdConfig(endpoints=[address, etcd.endpoint], attempt_timeout_s=0.2)
        async with connect(config) as client:
            await client.put(b"/a", b"1")


async def test_without_etcd_a_call_fails_in_time() -> None:
    async with connect(EtcdConfig(endpoints=["127.0.0.1:1"], timeout_s=0.5)) as client:
        with pytest.raises(EtcdUnavailableError):
            await client.get(b"/a")


async def test_users_and_tokens(client: EtcdClient, etcd: EtcdProcess) -> None:
    config = EtcdConfig(endpoints=[etcd.endpoint], user="root", password="wrong")
    async with connect(config) as stranger:
        with pytest.raises(EtcdError, match="auth"):
            await stranger.get(b"/a")


async def test_the_server_leaves_nothing_behind() -> None:
    async with run_etcd() as running:
        assert running.endpoint.startswith("127.0.0.1:")
        (server,) = keeper.children(running.pid)
        assert running.data_dir.exists()
    assert not running.data_dir.exists()
    assert not _is_there(server)
    assert not _is_there(running.pid)


async def test_a_server_that_does_not_start_says_why(etcd: EtcdProcess) -> None:
    with pytest.raises(EtcdServerError, match="address already in use"):
        async with run_etcd(port=int(etcd.endpoint.rpartition(":")[2])):
            pass


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def _first(watch: AsyncGenerator[list[Event], None]) -> list[Event]:
    async with asyncio.timeout(20), aclosing(watch) as batches:
        return await anext(batches)

"""A worker's log in etcd adds up to the blocks that it has, whatever happens to etcd and to its lease."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from kvrelay.etcd import EtcdUnavailableError, Lease, LeaseLostError, LeaseNotFoundError
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.disk_index import DiskIndex
from kvrelay.kv_transfer.held_blocks import HeldBlocks
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.prefix_log import MAX_DELTA_BLOCKS
from kvrelay.worker.prefix_publisher import PrefixPublisher, PublisherConfig
from tests.support.eventually import eventually
from tests.support.prefix_etcd import PrefixEtcd

LEASE, NEXT_LEASE = Lease(0xA, 5.0, 0.0), Lease(0xB, 5.0, 0.0)
AT_ONCE = PublisherConfig(interval_s=0)


def name(number: int) -> bytes:
    return number.to_bytes(8, "big") * 2


def names(*numbers: int) -> set[bytes]:
    """As in a log."""
    return {name(number)[:8] for number in numbers}


def fill(store: BlockStore, *numbers: int) -> None:
    """Blocks that nobody uses afterwards."""
    for number in numbers:
        (slot,) = store.reserve(1)
        store.unpin([store.commit(slot, name(number))])


def publisher(etcd: PrefixEtcd, store: BlockStore, config: PublisherConfig = AT_ONCE) -> PrefixPublisher:
    return PrefixPublisher(etcd.client, "c", "w", HeldBlocks(store), config)


@contextlib.asynccontextmanager
async def running(published: PrefixPublisher, lease: Lease = LEASE) -> AsyncIterator[asyncio.Task[None]]:
    task: asyncio.Task[None] = asyncio.create_task(published.run(lease))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_log_begins_with_all_that_is_there() -> None:
    etcd, store = PrefixEtcd(), BlockStore(8)
    fill(store, 1, 2)
    async with running(publisher(etcd, store)):
        await eventually(lambda: etcd.keys)
    assert list(etcd.keys) == [b"/kvrelay/c/prefix/w/a/00000000"]
    assert etcd.blocks(0xA) == names(1, 2)


async def test_an_empty_worker_says_so() -> None:
    etcd = PrefixEtcd()
    async with running(publisher(etcd, BlockStore(8))):
        await eventually(lambda: etcd.keys)
    assert etcd.blocks(0xA) == set()


async def test_changes_of_one_interval_are_one_delta() -> None:
    etcd, store = PrefixEtcd(), BlockStore(2)
    async with running(publisher(etcd, store)):
        await eventually(lambda: etcd.keys)
        fill(store, 1, 2, 3)  # The first is evicted again.
        await eventually(lambda: len(etcd.keys) == 2)
        delta = cluster_pb2.PrefixDelta.FromString(etcd.keys[b"/kvrelay/c/prefix/w/a/00000001"])
        assert (len(delta.added), len(delta.removed)) == (16, 8)
        assert delta.published_unix_ns > 0
        assert etcd.blocks(0xA) == names(2, 3)
        fill(store, 4)
        await eventually(lambda: etcd.blocks(0xA) == names(3, 4))


async def test_nothing_is_written_while_nothing_changes() -> None:
    etcd, store = PrefixEtcd(), BlockStore(8)
    async with running(publisher(etcd, store)):
        fill(store, 1)
        await eventually(lambda: etcd.blocks(0xA) == names(1))
        num_calls = etcd.num_calls
        fill(store, 1)  # It is there.
        for _ in range(20):
            await asyncio.sleep(0)
        assert etcd.num_calls == num_calls


@pytest.mark.parametrize(
    "config",
    [
        PublisherConfig(interval_s=0, max_deltas=3),
        PublisherConfig(interval_s=0, min_replaced_blocks=4),
    ],
)
async def test_a_long_log_is_replaced(config: PublisherConfig) -> None:
    etcd, store = PrefixEtcd(), BlockStore(4)
    most_keys = 0
    async with running(publisher(etcd, store, config)):
        await eventually(lambda: etcd.keys)
        for number in range(1, 40):
            fill(store, number)
            expected = names(*range(max(1, number - 3), number + 1))
            await eventually(lambda expected=expected: etcd.blocks(0xA) == expected)
            assert etcd.followed(0xA) == expected
            most_keys = max(most_keys, len(etcd.keys))
    assert most_keys <= 6
    assert min(etcd.keys) > b"/kvrelay/c/prefix/w/a/00000020", "numbers of deltas are never used again"


async def test_a_large_snapshot_is_in_chunks() -> None:
    etcd, store = PrefixEtcd(), BlockStore(MAX_DELTA_BLOCKS + 1)
    fill(store, *range(MAX_DELTA_BLOCKS + 1))
    async with running(publisher(etcd, store)):
        await eventually(lambda: len(etcd.keys) == 2)
    assert len(etcd.blocks(0xA)) == MAX_DELTA_BLOCKS + 1
    assert max(map(len, etcd.keys.values())) < (256 << 10) + 64


async def test_while_etcd_is_away_the_same_delta_is_tried_again() -> None:
    etcd, store = PrefixEtcd(), BlockStore(8)
    async with running(publisher(etcd, store)):
        await eventually(lambda: etcd.keys)
        etcd.error = EtcdUnavailableError("away")
        fill(store, 1)
        await eventually(lambda: len(etcd.puts) >= 3)
        fill(store, 2)
        etcd.error = None
        await eventually(lambda: etcd.blocks(0xA) == names(1, 2))
    assert len(set(etcd.puts)) == 3, "each key has one value"


async def test_what_is_gone_is_told_before_a_snapshot() -> None:
    etcd, store = PrefixEtcd(), BlockStore(1)
    async with running(publisher(etcd, store, PublisherConfig(interval_s=0, max_deltas=2))):
        fill(store, 1)
        await eventually(lambda: etcd.followed(0xA) == names(1))
        etcd.error = EtcdUnavailableError("away")
        fill(store, 2)
        await eventually(lambda: len(etcd.puts) >= 3)
        fill(store, 3)
        etcd.error = None
        await eventually(lambda: etcd.blocks(0xA) == names(3))
        assert etcd.followed(0xA) == names(3)


async def test_many_changes_are_several_deltas() -> None:
    etcd, store = PrefixEtcd(), BlockStore(MAX_DELTA_BLOCKS + 10)
    async with running(publisher(etcd, store)):
        await eventually(lambda: etcd.keys)
        fill(store, *range(MAX_DELTA_BLOCKS + 5))
        await eventually(lambda: len(etcd.blocks(0xA)) == MAX_DELTA_BLOCKS + 5)
    assert max(map(len, etcd.keys.values())) < (256 << 10) + 64


async def test_more_changes_than_are_kept_end_the_log() -> None:
    etcd, store = PrefixEtcd(), BlockStore(8)
    published = publisher(etcd, store)
    async with running(published) as task:
        await eventually(lambda: etcd.keys)
        etcd.error = EtcdUnavailableError("away")
        fill(store, 0)
        await eventually(lambda: len(etcd.puts) >= 2)
        fill(store, *range(1, 4 * MAX_DELTA_BLOCKS + 5))
        etcd.error = None
        with pytest.raises(LeaseLostError):
            await task
    async with running(published, NEXT_LEASE):
        await eventually(lambda: len(etcd.blocks(0xB)) == 8)


async def test_a_lease_that_is_gone_ends_the_log_and_the_next_one_begins_anew() -> None:
    etcd, store = PrefixEtcd(), BlockStore(8)
    published = publisher(etcd, store)
    async with running(published) as task:
        fill(store, 1)
        await eventually(lambda: etcd.blocks(0xA) == names(1))
        etcd.error = LeaseNotFoundError("gone")
        fill(store, 2)
        with pytest.raises(LeaseLostError):
            await task
    etcd.error = None
    fill(store, 3)
    async with running(published, NEXT_LEASE):
        await eventually(lambda: etcd.blocks(0xB) == names(1, 2, 3))


async def test_what_is_on_disk_is_there() -> None:
    etcd, store, disk = PrefixEtcd(), BlockStore(1), DiskIndex(1)
    published = PrefixPublisher(etcd.client, "c", "w", HeldBlocks(store, disk), AT_ONCE)
    place = disk.take()
    assert place is not None
    fill(store, 1)
    disk.put(name(1), place, checksum=0)
    async with running(published):
        fill(store, 2)  # In memory it takes the place of the first.
        await eventually(lambda: etcd.blocks(0xA) == names(1, 2))
        disk.drop(name(1))
        await eventually(lambda: etcd.blocks(0xA) == names(2))
        disk.drop(name(1))

"""Chores of a cluster, of which only the leader does any, with a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from kvrelay.coordinator.chores import Chores
from kvrelay.etcd import EtcdClient, EtcdConfig, WatchOutdatedError, connect
from tests.support.etcd_process import EtcdProcess, etcd_process
from tests.support.fake_cluster import until

HISTORY_S = 0.3


class Coordinator:
    """The chores of one coordinator, and what they did."""

    def __init__(self, client: EtcdClient, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chores = Chores("test", name, etcd_history_s=HISTORY_S)
        self.compacted: list[int] = []
        self.client = client
        monkeypatch.setattr(client, "compact", self._noted(client.compact))

    def _noted(self, compact: Callable[[int], Awaitable[None]]) -> Callable[[int], Awaitable[None]]:
        async def noted(revision: int) -> None:
            self.compacted.append(revision)
            await compact(revision)

        return noted


@asynccontextmanager
async def coordinators(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch, *names: str
) -> AsyncIterator[dict[Coordinator, asyncio.Task[None]]]:
    async with asyncio.TaskGroup() as tasks:
        running: dict[Coordinator, asyncio.Task[None]] = {}
        clients = []
        for name in names:
            opened = connect(EtcdConfig(endpoints=[etcd.endpoint]))
            clients.append(opened)
            each = Coordinator(await opened.__aenter__(), name, monkeypatch)
            running[each] = tasks.create_task(each.chores.run(each.client))
        yield running
        for task in running.values():
            task.cancel()
        await asyncio.wait(running.values())
        for opened in clients:
            await opened.__aexit__(None, None, None)


async def test_the_leader_alone_keeps_the_history_short_and_another_one_goes_on_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with etcd_process() as etcd, coordinators(etcd, monkeypatch, "a", "b", "c") as running:
        for _ in range(2):
            leading = [each for each in running if each.chores.is_leading]
            await until(lambda: any(each.chores.is_leading for each in running))
            (leader,) = [each for each in running if each.chores.is_leading]
            first = await leader.client.put(b"/k", b"1")
            while not leader.compacted or leader.compacted[-1] < first:
                await leader.client.put(b"/k", b"2")
            with pytest.raises(WatchOutdatedError):
                await anext(leader.client.watch_prefix(b"/k", start_revision=first))
            assert all(not each.compacted for each in running if each is not leader and each not in leading)
            assert len(set(leader.compacted)) == len(leader.compacted)
            running.pop(leader).cancel()
            await until(lambda: not leader.chores.is_leading)  # noqa: B023 - awaited here


async def test_chores_go_on_when_etcd_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with etcd_process() as etcd, coordinators(etcd, monkeypatch, "a") as running:
        (only,) = running
        await until(lambda: only.chores.is_leading)
        etcd.kill()
        await until(lambda: not only.chores.is_leading)
        await etcd.start()
        await until(lambda: only.chores.is_leading)


async def test_without_a_wish_there_is_nothing_to_do() -> None:
    async with connect(EtcdConfig(endpoints=["127.0.0.1:1"])) as client:
        await Chores("test", "a", etcd_history_s=None).run(client)

"""A cluster of real processes, each started again when it ends, with a link in front of everybody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx

from kvrelay import keeper
from kvrelay.etcd import EtcdClient, EtcdConfig, connect
from kvrelay.launch.readiness import wait_listening
from kvrelay.launch.supervisor import Supervisor, SupervisorConfig, supervise
from kvrelay.membership import list_coordinators, list_workers
from tests.chaos.engines import TestedEngine
from tests.chaos.links import Link, open_link
from tests.chaos.members import (
    CLUSTER,
    COORDINATORS,
    ETCD,
    WORKERS,
    Addresses,
    etcd_spec,
    free_addresses,
    member_specs,
)
from tests.chaos.points import Armory

_POLL_S = 0.1
_ANSWER_TIMEOUT_S = 2.0
_RESTART = {"first_delay_s": 0.3, "max_delay_s": 2.0, "healthy_s": 10.0}


class Cluster:
    """Made by `open_cluster`. Everything belongs to the running event loop."""

    def __init__(self, directory: Path, run_id: str, addresses: Addresses, links: Mapping[str, Link]) -> None:
        self.directory = directory
        self.run_id = run_id
        self.addresses = addresses
        self.links = links
        """By name: `decode-0.grpc`, `decode-0.kv`, `decode-0.etcd`, `coordinator-0.grpc`, `coordinator-0.http`."""
        self.armory = Armory(directory / "points")
        self.serving: set[str] = set()
        """Coordinators that said that they are ready when they were asked last."""
        self.num_starts: Counter[str] = Counter()
        self.unexpected_ends: list[str] = []
        self._keepers: dict[str, int] = {}
        self._ends_due: set[tuple[str, int]] = set()
        """Members and their starts, those that a fault ends."""

    def on_started(self, name: str, pid: int) -> None:
        """See `ChildListener`."""
        self._keepers[name] = pid
        self.num_starts[name] += 1

    def on_ended(self, name: str, status: int, restart_in_s: float) -> None:
        """See `ChildListener`. An end that no fault has asked for is noted."""
        self._keepers.pop(name, None)
        self.serving.discard(name)
        if (name, self.num_starts[name]) not in self._ends_due:
            self.unexpected_ends.append(f"{name} ended by itself with status {status} at {time.strftime('%H:%M:%S')}")

    def expect_end(self, name: str) -> int:
        """A fault is about to end it; returns which of its starts that concerns."""
        self._ends_due.add((name, self.num_starts[name]))
        return self.num_starts[name]

    def expect_no_end(self, name: str, start: int) -> None:
        """The fault did not come to it."""
        self._ends_due.discard((name, start))

    def pid_of(self, name: str) -> int | None:
        """Of the member itself, not of its keeper; None while it is being started again."""
        keeper_pid = self._keepers.get(name)
        children = keeper.children(keeper_pid) if keeper_pid is not None else []
        return children[0] if children else None

    @property
    def keepers(self) -> Mapping[str, int]:
        """Of those that run now, by member."""
        return self._keepers

    async def wait_running(self, name: str) -> int:
        """Its process id, as soon as it has one."""
        while (pid := self.pid_of(name)) is None:
            await asyncio.sleep(_POLL_S)
        return pid

    async def signal(self, name: str, number: signal.Signals) -> int:
        """To the member's own process, once it runs; which it was."""
        while True:
            pid = await self.wait_running(name)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                return pid

    @contextlib.asynccontextmanager
    async def etcd(self) -> AsyncIterator[EtcdClient]:
        """A client of its own, past all links."""
        async with connect(EtcdConfig(endpoints=[self.addresses.listen[ETCD, "client"]])) as client:
            yield client

    async def wait_whole(self, timeout_s: float) -> None:
        """Until all members are registered and all coordinators ready. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s), self.etcd() as client:
            while True:
                workers = {info.worker_id for info in await list_workers(client, CLUSTER)}
                coordinators = {info.coordinator_id for info in await list_coordinators(client, CLUSTER)}
                if workers == set(WORKERS) and coordinators == set(COORDINATORS) == self.serving:
                    return
                await asyncio.sleep(_POLL_S)

    async def watch_coordinator(self, name: str) -> None:
        """Note whether it takes requests, as a load balancer does, until cancelled.

        One that is silent stays what it is.
        """
        url = f"http://{self.addresses.listen[name, 'http']}/ready"
        async with httpx.AsyncClient(timeout=_ANSWER_TIMEOUT_S) as http:
            while True:
                starts = self.num_starts[name]
                try:
                    is_ready = (await http.get(url)).status_code == 200
                except httpx.TimeoutException:
                    is_ready = name in self.serving
                except httpx.HTTPError:
                    is_ready = False
                if is_ready and starts == self.num_starts[name]:
                    self.serving.add(name)
                else:
                    self.serving.discard(name)
                await asyncio.sleep(_POLL_S)


@contextlib.asynccontextmanager
async def open_cluster(directory: Path, engine: TestedEngine) -> AsyncIterator[Cluster]:
    """All members registered and ready; nothing of them runs afterwards. `directory` is empty and stays."""
    for name in ("logs", "tmp", "points", ETCD):
        (directory / name).mkdir()
    addresses = Addresses(listen=free_addresses())
    async with contextlib.AsyncExitStack() as stack:
        links = {}
        for (name, kind), target in addresses.listen.items():
            if name != ETCD:
                links[f"{name}.{kind}"] = link = await stack.enter_async_context(open_link(f"{name}.{kind}", target))
                addresses.advertised[name, kind] = link.address
        for name in (*COORDINATORS, *WORKERS):
            link = await stack.enter_async_context(open_link(f"{name}.etcd", addresses.listen[ETCD, "client"]))
            links[link.name], addresses.etcd[name] = link, link.address
        cluster = Cluster(directory, directory.name, addresses, links)
        config = SupervisorConfig(run_id=directory.name, **_RESTART)
        async with supervise(config, cluster) as supervisor, asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(cluster.watch_coordinator(name)) for name in COORDINATORS]
            await _start(supervisor, cluster, engine)
            try:
                yield cluster
            finally:
                for task in watching:
                    task.cancel()


async def _start(supervisor: Supervisor, cluster: Cluster, engine: TestedEngine) -> None:
    directory, addresses = cluster.directory, cluster.addresses
    supervisor.start(etcd_spec(directory, addresses))
    async with asyncio.timeout(engine.start_timeout_s):
        await wait_listening(addresses.listen[ETCD, "client"])
    for spec in member_specs(directory, addresses, engine):
        supervisor.start(spec)
    await cluster.wait_whole(engine.start_timeout_s)

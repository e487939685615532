"""One worker as a process of its own, with an etcd, and what it leaves behind."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvrelay import etcd, membership
from kvrelay.etcd.server import run_etcd
from kvrelay.v1 import cluster_pb2
from tests.support.processes import gone

_JOIN_S = 120.0


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One worker process and its etcd."""

    process: subprocess.Popen[bytes]
    client: etcd.EtcdClient
    log: Path

    async def workers(self) -> list[cluster_pb2.WorkerInfo]:
        return list(await membership.list_workers(self.client, "default"))

    async def joined(self) -> cluster_pb2.WorkerInfo:
        async with asyncio.timeout(_JOIN_S):
            while not (workers := await self.workers()):
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)
        return workers[0]

    def engine_processes(self) -> list[psutil.Process]:
        """Its children that compute."""
        return [child for child in _children(self.process) if "EngineCore" in child.name() + str(child.cmdline())]

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, 20)


@asynccontextmanager
async def worker_process(directory: Path, command: Callable[[str], Sequence[str]]) -> AsyncIterator[WorkerProcess]:
    """`command` is told etcd's endpoint. What is left of the process at the end is killed."""
    log = directory / "log"
    async with run_etcd() as server, etcd.connect(etcd.EtcdConfig(endpoints=[server.endpoint])) as client:
        process = _start(log, command(server.endpoint))
        try:
            yield WorkerProcess(process, client, log)
        finally:
            children = _children(process)
            process.kill()
            process.wait()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            assert gone(child.pid for child in children)


def _start(log: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []

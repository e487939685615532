"""An etcd server that a test can kill and start again at the same address."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from kvrelay import keeper
from kvrelay.etcd.server import RunningEtcd, run_etcd
from tests.support.processes import gone


class EtcdProcess:
    """Made by `etcd_process`."""

    def __init__(self, data_dir: Path, stack: AsyncExitStack) -> None:
        self._data_dir = data_dir
        self._stack = stack
        self._running: RunningEtcd | None = None

    @property
    def endpoint(self) -> str:
        assert self._running is not None
        return self._running.endpoint

    def kill(self) -> None:
        """SIGKILL of the server itself; its port is free afterwards."""
        assert self._running is not None
        (server,) = keeper.children(self._running.pid)
        os.kill(server, signal.SIGKILL)
        assert gone([server])

    async def start(self) -> None:
        """The first time at a free port, then at the same one with the same data."""
        port = int(self.endpoint.rpartition(":")[2]) if self._running else 0
        self._running = await self._stack.enter_async_context(run_etcd(data_dir=self._data_dir, port=port))

    async def stop_for_good(self) -> None:
        """End the server and forget its data; the next `start` is another store at the same address."""
        await self._stack.aclose()
        shutil.rmtree(self._data_dir)
        self._data_dir.mkdir()


@asynccontextmanager
async def etcd_process() -> AsyncIterator[EtcdProcess]:
    """A running server; its directory is removed at the end."""
    data_dir = Path(tempfile.mkdtemp(prefix="kvrelay-test-etcd-"))
    try:
        async with AsyncExitStack() as stack:
            process = EtcdProcess(data_dir, stack)
            await process.start()
            yield process
    finally:
        shutil.rmtree(data_dir)

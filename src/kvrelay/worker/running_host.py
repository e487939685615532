"""How does a worker's host start, and end with nothing left?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from kvrelay.engine.base import Engine, KvReport
from kvrelay.kv_transfer.collectives import usable_backends
from kvrelay.kv_transfer.disk_file import DiskFile
from kvrelay.kv_transfer.disk_tier import DiskTier
from kvrelay.kv_transfer.lending import Lender
from kvrelay.kv_transfer.link_coder import named_layout
from kvrelay.kv_transfer.segment import Segment
from kvrelay.tracing import Tracing
from kvrelay.worker.engine_watch import DEFAULT_WATCH, WatchConfig
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.store_config import StoreConfig


async def _fail_with(broken: asyncio.Future[None]) -> None:
    await broken


@asynccontextmanager
async def open_host(
    engine: Engine, config: StoreConfig, tracing: Tracing, watch: WatchConfig = DEFAULT_WATCH
) -> AsyncIterator[WorkerHost]:
    """Start the engine, which may take minutes, and run a host over it; end both at exit.

    An engine that dies, or does nothing any more, ends the body with an `ExceptionGroup` of `EngineDeadError`.
    """
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_broken(error: Exception) -> None:
        if not broken.done():
            broken.set_exception(error)

    def on_kv_reports(reports: Sequence[KvReport]) -> None:
        """Reports are about submissions, so none comes before the host is there."""
        try:
            host.on_kv_reports(reports)
        except Exception as error:
            on_broken(error)

    async with contextlib.AsyncExitStack() as stack:
        segment = Segment.create(config.size_bytes)
        stack.callback(segment.close)
        file = (
            await asyncio.to_thread(DiskFile.create, config.disk_path, config.disk_bytes) if config.disk_bytes else None
        )
        if file is not None:
            stack.callback(file.close)
        stack.push_async_callback(engine.close)
        info = await engine.start(segment, on_kv_reports)
        info = replace(info, layout=named_layout(config.compression, info.layout))
        async with asyncio.TaskGroup() as tasks:
            host = WorkerHost(engine, info, segment, config, tracing, on_broken, watch)
            host.lender = Lender(host.store, segment, info.layout, host.peers, host.counters, tasks)
            if config.transport.shares_memory:
                host.lender.local_segment = host.local_segment
            if file is not None:
                host.disk = DiskTier(host.store, segment, file, host.counters)
                stack.push_async_callback(host.disk.close)
            host.collectives.backends = await asyncio.to_thread(usable_backends, config.transport)
            host.top_up_grants()
            loops = [
                tasks.create_task(_fail_with(broken), name="kv-reports"),
                tasks.create_task(host.run(), name="engine-steps"),
                tasks.create_task(host.run_calls(), name="engine-calls"),
                tasks.create_task(host.watch.run(), name="engine-watch"),
                tasks.create_task(host.expire(), name="expire"),
            ]
            try:
                yield host
            finally:
                for loop in loops:
                    loop.cancel()
                host.lender.close()
                await host.peers.close()
                await asyncio.to_thread(host.collectives.close)

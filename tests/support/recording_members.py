"""A listener of membership that remembers what it heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvrelay.v1 import cluster_pb2


class RecordingMembers:
    """`calls` in order; `current` is the picture that they add up to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.current: dict[str, cluster_pb2.WorkerInfo] = {}
        self.connected: bool | None = None
        self._changed = asyncio.Event()

    def join(self, record: cluster_pb2.WorkerInfo, /) -> None:
        assert record.worker_id not in self.current
        self._note("join", record.worker_id)
        self.current[record.worker_id] = record

    def update(self, record: cluster_pb2.WorkerInfo, /) -> None:
        assert record.worker_id in self.current
        self._note("update", record.worker_id)
        self.current[record.worker_id] = record

    def leave(self, member_id: str, /) -> None:
        self._note("leave", member_id)
        del self.current[member_id]

    def on_connected(self, connected: bool) -> None:
        self.connected = connected
        self._changed.set()

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
        """Wait for a condition on this object; raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _note(self, kind: str, member_id: str) -> None:
        self.calls.append((kind, member_id))
        self._changed.set()

"""A link to a worker ends when it is told to."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest

from kvrelay.coordinator.worker_link import WorkerLink
from kvrelay.v1 import cluster_pb2


async def test_a_cancellation_that_meets_a_breaking_stream_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    started = asyncio.Event()

    async def broken_session(_: WorkerLink) -> str:
        """As a TaskGroup before Python 3.13, whose stream breaks and which is cancelled while it ends."""
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "the stream broke"
        return ""

    monkeypatch.setattr(WorkerLink, "_run_session", broken_session)
    link = WorkerLink(cluster_pb2.WorkerInfo(worker_id="w"), "c", Mock(), max_queued_messages=1)
    task = asyncio.create_task(link.run())
    await started.wait()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5.0)
    assert task in done
    assert task.cancelled()

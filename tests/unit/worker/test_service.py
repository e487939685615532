"""The Worker service: what becomes of a session, in gRPC's terms."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, cast

import grpc
import pytest

from kvrelay.v1 import cluster_pb2, worker_pb2
from kvrelay.worker.outbox import Outbox
from kvrelay.worker.record import WorkerRecord
from kvrelay.worker.role import DecodeRunner, PrefillRunner
from kvrelay.worker.service import WorkerService
from kvrelay.worker.submission import Sink


class Talkative:
    """Both roles: says a lot at once."""

    async def prefill(self, request: worker_pb2.Prefill, sink: Sink) -> None:
        raise AssertionError

    async def decode(self, request: worker_pb2.Decode, sink: Sink) -> None:
        while True:
            sink(worker_pb2.TokenDelta(request_id=request.request_id, token_ids=range(100)))
            await asyncio.sleep(0)

    def forget(self, request_id: str) -> None:
        """Nothing was received."""

    def session(self, coordinator_id: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class AbortedError(Exception):
    """In place of gRPC's own."""


class DeafContext:
    """Takes hello, and nothing after it."""

    def __init__(self) -> None:
        self.num_written = 0

    async def write(self, message: worker_pb2.WorkerMessage) -> None:
        self.num_written += 1
        if self.num_written > 1:
            await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise AbortedError(code.name, details)


async def _messages() -> AsyncIterator[worker_pb2.CoordinatorMessage]:
    yield worker_pb2.CoordinatorMessage(hello=worker_pb2.CoordinatorHello(coordinator_id="c"))
    yield worker_pb2.CoordinatorMessage(decode=worker_pb2.Decode(request_id="r"))
    await asyncio.Event().wait()


async def test_a_coordinator_that_does_not_read_is_told_why_its_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.worker.session.Outbox", partial(Outbox, max_waiting_bytes=1000))
    role = Talkative()
    service = WorkerService(
        WorkerRecord(cluster_pb2.WorkerInfo()),
        worker_pb2.WorkerStatus,
        cast("PrefillRunner", role),
        cast("DecodeRunner", role),
    )
    async with asyncio.timeout(10):
        with pytest.raises(AbortedError, match="does not read") as caught:
            await service.Session(_messages(), cast("Any", DeafContext()))
        assert caught.value.args[0] == "RESOURCE_EXHAUSTED"
        await service.wait_hung_up()

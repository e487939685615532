"""A registration ends when it is told to, takes its owner with it when it breaks, and swallows no cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Never, cast

import pytest

from kvrelay.etcd import EtcdClient, Lease, LeaseLostError
from kvrelay.membership import register, registration
from kvrelay.v1 import cluster_pb2

RECORD = cluster_pb2.WorkerInfo(worker_id="w")


class FakeEtcd:
    """Grants every lease; `on_end` is awaited when keeping one alive is cancelled."""

    def __init__(self, on_end: Callable[[], Any], put_error: Exception | None = None) -> None:
        self._on_end = on_end
        self._put_error = put_error
        self.kept = asyncio.Event()
        self.num_revoked = 0

    @property
    def client(self) -> EtcdClient:
        return cast("EtcdClient", self)

    async def grant_lease(self, ttl_s: int) -> Lease:
        return Lease(1, ttl_s, 0.0)

    async def revoke_lease(self, lease_id: int) -> None:
        self.num_revoked += 1

    async def keep_alive(self, lease: Lease) -> Never:
        self.kept.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self._on_end()
        raise AssertionError

    async def put(self, key: bytes, value: bytes, *, lease_id: int = 0) -> int:
        if self._put_error is not None:
            raise self._put_error
        return 1


async def _nothing() -> None:
    """Ends at once."""


async def test_a_lease_lost_in_the_moment_of_leaving_does_not_keep_it_alive() -> None:
    async def lose() -> None:
        raise LeaseLostError(1)

    etcd = FakeEtcd(lose)
    async with asyncio.timeout(5), register(etcd.client, b"/w", RECORD) as registration:
        await etcd.kept.wait()
        await registration.wait_written()
    assert etcd.num_revoked == 1


async def test_an_etcd_that_is_silent_while_one_leaves_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A timeout has no text of its own."""
    monkeypatch.setattr(registration, "_LEAVE_TIMEOUT_S", 0.01)
    etcd = FakeEtcd(_nothing)
    monkeypatch.setattr(etcd, "revoke_lease", lambda _: asyncio.Event().wait())
    async with asyncio.timeout(5), register(etcd.client, b"/w", RECORD):
        await etcd.kept.wait()
    assert "could not leave: etcd has not answered within 0.01 s" in caplog.text


async def test_whoever_is_cancelled_while_leaving_is_cancelled() -> None:
    leaving, may_end = asyncio.Event(), asyncio.Event()

    async def end_slowly() -> None:
        leaving.set()
        await may_end.wait()

    etcd = FakeEtcd(end_slowly)

    async def owner() -> None:
        async with register(etcd.client, b"/w", RECORD):
            await etcd.kept.wait()

    async with asyncio.timeout(5):
        task = asyncio.create_task(owner())
        await leaving.wait()
        task.cancel()
        may_end.set()
        await asyncio.wait([task])
    assert task.cancelled()
    assert etcd.num_revoked == 1


async def test_a_registration_that_breaks_ends_its_owner() -> None:
    etcd = FakeEtcd(_nothing, put_error=RuntimeError("broken"))
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(5), register(etcd.client, b"/w", RECORD):
            await asyncio.Event().wait()
    assert caught.group_contains(RuntimeError, match="broken")
    assert etcd.num_revoked == 1

"""How does a process stay in the cluster's list as long as it lives, whatever happens to etcd?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Never

from google.protobuf.message import Message

from kvrelay.cancellation import raise_if_cancelled
from kvrelay.etcd import EtcdClient, EtcdError, EtcdUnavailableError, Lease, LeaseLostError, LeaseNotFoundError
from kvrelay.etcd.transport import Backoff

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 5
_LEAVE_TIMEOUT_S = 2.0

Companion = Callable[[Lease], Coroutine[Any, Any, Never]]
"""Writes other keys under the lease, for as long as it lives. Raises `LeaseLostError` when it finds it gone."""


@asynccontextmanager
async def register(
    client: EtcdClient, key: bytes, record: Message | None = None, *, ttl_s: int = DEFAULT_TTL_S
) -> AsyncIterator[Registration]:
    """Keep a record at `key` inside this context, under a lease that ends with this process.

    Without `record` nothing happens before one is `put`. Nothing waits for etcd and nothing fails while etcd is away:
    the record is written as soon as it can be, and again under a new lease when the lease is lost. Leaving deletes the
    record, trying for two seconds. What the body raises comes out in an `ExceptionGroup`.
    """
    registration = Registration(client, key, ttl_s)
    if record is not None:
        registration.put(record)
    try:
        async with asyncio.TaskGroup() as tasks:
            holding = tasks.create_task(registration.run(), name=f"registration of {key.decode()}")
            registration.holding = holding
            try:
                yield registration
            finally:
                holding.cancel()
    finally:
        await registration.leave()


class Registration:
    """One record under a lease. Made by `register`."""

    def __init__(self, client: EtcdClient, key: bytes, ttl_s: int) -> None:
        self._client = client
        self._key = key
        self._value: bytes | None = None
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._companions: list[Companion] = []
        self._outdated = asyncio.Event()
        self._written = asyncio.Event()
        self.holding: asyncio.Task[None] | None = None
        """What keeps the record; `register` sets it."""

    def put(self, record: Message) -> None:
        """Set or replace the record; it is written in the background."""
        self._value = record.SerializeToString()
        self._written.clear()
        self._outdated.set()

    def accompany(self, companion: Companion) -> None:
        """Run it beside the record under every lease from the next one on, cancelled when the lease is lost."""
        self._companions.append(companion)

    async def update(self, record: Message) -> None:
        """Replace the record, and wait until etcd holds it, however long etcd is away."""
        self.put(record)
        await self.wait_written()

    async def wait_written(self) -> None:
        """Until etcd holds the newest record under a lease that is kept."""
        await self._written.wait()

    async def run(self) -> None:
        """Hold the record, once there is one, until cancelled."""
        await self._outdated.wait()
        backoff = Backoff()
        while True:
            try:
                self._lease = await self._client.grant_lease(self._ttl_s)
                backoff.reset()
                await self._hold(self._lease)
            except LeaseLostError as error:
                logger.warning("%s; registering %s again", error, self._key.decode())
            except EtcdUnavailableError as error:
                logger.warning("cannot register %s yet: %s", self._key.decode(), error)
            except EtcdError as error:
                logger.error("etcd refuses to register %s: %s", self._key.decode(), error)
            raise_if_cancelled()
            self._written.clear()
            await asyncio.sleep(backoff.next_s())

    async def withdraw(self) -> None:
        """Leave before the context ends; the record does not come back."""
        if self.holding is not None:
            self.holding.cancel()
            await asyncio.wait([self.holding])
        await self.leave()
        self._lease = None

    async def leave(self) -> None:
        """Delete the record by ending its lease; without etcd the lease ends by itself."""
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self._client.revoke_lease(self._lease.lease_id)
        except (EtcdError, TimeoutError) as error:
            reason = str(error) or f"etcd has not answered within {_LEAVE_TIMEOUT_S:g} s"
            logger.warning("could not leave: %s; the record goes within %g s", reason, self._lease.ttl_s)

    async def _hold(self, lease: Lease) -> None:
        """Until the lease is lost. Raises `EtcdError`."""
        self._outdated.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._publish(lease))
                for companion in self._companions:
                    tasks.create_task(companion(lease))
                # In the body, for an error that meets a task group at its end leaves its task marked as cancelled.
                await self._client.keep_alive(lease)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _publish(self, lease: Lease) -> None:
        backoff = Backoff()
        while True:
            await self._outdated.wait()
            self._outdated.clear()
            assert self._value is not None
            try:
                await self._client.put(self._key, self._value, lease_id=lease.lease_id)
            except LeaseNotFoundError:
                raise LeaseLostError(lease.lease_id) from None
            except EtcdUnavailableError:
                self._outdated.set()
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            if not self._outdated.is_set():
                self._written.set()

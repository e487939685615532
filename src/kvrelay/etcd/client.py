"""What can be asked of etcd? Keys, transactions, leases, watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Never

from kvrelay.etcd import rpc_pb2
from kvrelay.etcd.errors import LeaseNotFoundError
from kvrelay.etcd.lease import keep_alive
from kvrelay.etcd.transport import EtcdConfig, Transport
from kvrelay.etcd.watch import watch

DEFAULT_PAGE_KEYS = 1_000


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys under a prefix as they were at one revision, in order of their names."""

    entries: Sequence[rpc_pb2.KeyValue]
    revision: int
    cluster_id: int


@dataclass(frozen=True, slots=True)
class Creation:
    """What came of `EtcdClient.create`, at one revision."""

    found: rpc_pb2.KeyValue | None
    """The key as it was already; None when it was created."""
    revision: int
    cluster_id: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease."""

    lease_id: int
    ttl_s: float
    granted_at: float
    """On the event loop's clock, when it was asked for."""


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key behind all keys that begin with `prefix`."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\0"


@asynccontextmanager
async def connect(config: EtcdConfig) -> AsyncIterator[EtcdClient]:
    """A client for the running event loop. Nothing is sent before the first call."""
    transport = Transport(config)
    try:
        yield EtcdClient(transport)
    finally:
        await transport.close()


class EtcdClient:
    """Typed calls. All raise `EtcdUnavailableError` when no endpoint answers, `EtcdError` when etcd refuses.

    Calls whose repetition does no harm are tried again within `EtcdConfig.timeout_s`; a transaction is sent once.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def get(self, key: bytes) -> rpc_pb2.KeyValue | None:
        response = await self._range(rpc_pb2.RangeRequest(key=key))
        return response.kvs[0] if response.kvs else None

    async def list_prefix(self, prefix: bytes, *, page_keys: int = DEFAULT_PAGE_KEYS) -> Listing:
        """Everything under `prefix` at one revision. Watch from `revision + 1` to miss nothing."""
        request = rpc_pb2.RangeRequest(key=prefix, range_end=prefix_end(prefix), limit=page_keys)
        entries: list[rpc_pb2.KeyValue] = []
        while True:
            response = await self._range(request)
            request.revision = request.revision or response.header.revision
            entries += response.kvs
            if not response.more:
                return Listing(entries, request.revision, response.header.cluster_id)
            request.key = entries[-1].key + b"\0"

    async def put(self, key: bytes, value: bytes, *, lease_id: int = 0) -> int:
        """Write a key and return the revision. Raises `LeaseNotFoundError`."""
        request = rpc_pb2.PutRequest(key=key, value=value, lease=lease_id)
        return (await self._transport.unary("/etcdserverpb.KV/Put", request, rpc_pb2.PutResponse)).header.revision

    async def create(self, key: bytes, value: bytes, *, lease_id: int) -> Creation:
        """Write a key unless it exists. Sent once, so after `EtcdUnavailableError` it may have been written.

        Raises `LeaseNotFoundError`.
        """
        absent = rpc_pb2.Compare(key=key, target=rpc_pb2.Compare.CREATE, create_revision=0)
        put = rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value, lease=lease_id))
        get = rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=key))
        response = await self.txn(rpc_pb2.TxnRequest(compare=[absent], success=[put], failure=[get]))
        found = None if response.succeeded else response.responses[0].response_range.kvs[0]
        return Creation(found, response.header.revision, response.header.cluster_id)

    async def delete(self, key: bytes) -> bool:
        """Delete a key; true when it was there."""
        return await self._delete(rpc_pb2.DeleteRangeRequest(key=key)) > 0

    async def delete_prefix(self, prefix: bytes) -> int:
        """Delete everything under `prefix` and return the number of keys."""
        return await self._delete(rpc_pb2.DeleteRangeRequest(key=prefix, range_end=prefix_end(prefix)))

    async def delete_range(self, first: bytes, end: bytes) -> int:
        """Delete the keys from `first` on that lie before `end`, all at one revision; returns their number."""
        return await self._delete(rpc_pb2.DeleteRangeRequest(key=first, range_end=end))

    async def txn(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        """Sent once; after `EtcdUnavailableError` it may or may not have been applied."""
        return await self._transport.unary("/etcdserverpb.KV/Txn", request, rpc_pb2.TxnResponse, idempotent=False)

    async def compact(self, revision: int) -> None:
        """Forget everything before `revision`."""
        request = rpc_pb2.CompactionRequest(revision=revision, physical=True)
        path = "/etcdserverpb.KV/Compact"
        await self._transport.unary(path, request, rpc_pb2.CompactionResponse, idempotent=False)

    async def grant_lease(self, ttl_s: int) -> Lease:
        """A lease of `ttl_s` or, where etcd allows only longer ones, more.

        Trying again may leave a lease that nobody keeps; it holds nothing and expires.
        """
        now = asyncio.get_running_loop().time()
        path, request = "/etcdserverpb.Lease/LeaseGrant", rpc_pb2.LeaseGrantRequest(TTL=ttl_s)
        response = await self._transport.unary(path, request, rpc_pb2.LeaseGrantResponse)
        return Lease(response.ID, response.TTL, now)

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease and delete its keys. One that is gone already is fine."""
        path, request = "/etcdserverpb.Lease/LeaseRevoke", rpc_pb2.LeaseRevokeRequest(ID=lease_id)
        with suppress(LeaseNotFoundError):
            await self._transport.unary(path, request, rpc_pb2.LeaseRevokeResponse)

    async def keep_alive(self, lease: Lease) -> Never:
        """Renew the lease until cancelled. Raises `LeaseLostError`."""
        await keep_alive(self._transport, lease.lease_id, lease.ttl_s, granted_at=lease.granted_at)

    def watch_prefix(
        self,
        prefix: bytes,
        *,
        start_revision: int,
        cluster_id: int = 0,
        on_connected: Callable[[bool], None] | None = None,
    ) -> AsyncGenerator[list[rpc_pb2.Event], None]:
        """The changes under `prefix` from a revision on; see `kvrelay.etcd.watch.watch`."""
        return watch(
            self._transport,
            prefix,
            prefix_end(prefix),
            start_revision=start_revision,
            cluster_id=cluster_id,
            on_connected=on_connected,
        )

    async def status(self) -> rpc_pb2.StatusResponse:
        """Version and size of the endpoint that answers."""
        path = "/etcdserverpb.Maintenance/Status"
        return await self._transport.unary(path, rpc_pb2.StatusRequest(), rpc_pb2.StatusResponse)

    async def _range(self, request: rpc_pb2.RangeRequest) -> rpc_pb2.RangeResponse:
        return await self._transport.unary("/etcdserverpb.KV/Range", request, rpc_pb2.RangeResponse)

    async def _delete(self, request: rpc_pb2.DeleteRangeRequest) -> int:
        path = "/etcdserverpb.KV/DeleteRange"
        return (await self._transport.unary(path, request, rpc_pb2.DeleteRangeResponse)).deleted

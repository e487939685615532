"""How is a worker's log of blocks written to etcd, each delta once and in order?"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from kvrelay.etcd import EtcdClient, EtcdError, Lease, LeaseLostError, LeaseNotFoundError
from kvrelay.etcd.transport import Backoff
from kvrelay.membership import prefix_delta_key
from kvrelay.v1 import cluster_pb2

logger = logging.getLogger(__name__)

_KEY_BYTES = 8
MAX_DELTA_BLOCKS = 32_768
"""In one key: 256 KiB."""


class PrefixLog:
    """One log, under one lease.

    What is to be written is written, however long etcd is away, before the next call may begin. All methods raise
    `LeaseLostError` when etcd says that the lease is gone: then the log is over.
    """

    def __init__(self, client: EtcdClient, cluster: str, worker_id: str, lease: Lease) -> None:
        self._client = client
        self._cluster = cluster
        self._worker_id = worker_id
        self._lease = lease
        self._next = 0
        self.num_deltas = 0
        """Since the last snapshot."""
        self.num_delta_blocks = 0
        """That these deltas name."""
        self.num_snapshot_blocks = 0

    async def append(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Write one delta of block hashes, `MAX_DELTA_BLOCKS` at most."""
        delta = cluster_pb2.PrefixDelta(
            added=_packed(added), removed=_packed(removed), published_unix_ns=time.time_ns()
        )
        key, value = self._key(self._next), delta.SerializeToString()
        await self._insist(lambda: self._client.put(key, value, lease_id=self._lease.lease_id))
        self._next += 1
        self.num_deltas += 1
        self.num_delta_blocks += len(added) + len(removed)

    async def replace(self, hashes: Sequence[bytes]) -> None:
        """Write a snapshot, also of nothing, and delete what was before it."""
        first = self._next
        for start in range(0, max(1, len(hashes)), MAX_DELTA_BLOCKS):
            await self.append(hashes[start : start + MAX_DELTA_BLOCKS], ())
        if first:
            await self._insist(lambda: self._client.delete_range(self._key(0), self._key(first)))
        self.num_deltas = self.num_delta_blocks = 0
        self.num_snapshot_blocks = len(hashes)

    def _key(self, sequence: int) -> bytes:
        return prefix_delta_key(self._cluster, self._worker_id, self._lease.lease_id, sequence)

    async def _insist(self, call: Callable[[], Awaitable[object]]) -> None:
        """Until etcd has done it: the same bytes under the same key, so that it may have done it before."""
        backoff = Backoff()
        has_warned = False
        while True:
            try:
                await call()
                return
            except LeaseNotFoundError:
                raise LeaseLostError(self._lease.lease_id) from None
            except EtcdError as error:
                if not has_warned:
                    logger.warning("cannot write which blocks %s has yet: %s", self._worker_id, error)
                    has_warned = True
            await asyncio.sleep(backoff.next_s())


def _packed(hashes: Sequence[bytes]) -> bytes:
    return b"".join([block_hash[:_KEY_BYTES] for block_hash in hashes])

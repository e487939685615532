"""How does the cluster learn which blocks a worker has? From a log in etcd, under the lease of the worker's record."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never

from kvrelay.etcd import EtcdClient, Lease, LeaseLostError
from kvrelay.kv_transfer.held_blocks import HeldBlocks
from kvrelay.worker.prefix_log import MAX_DELTA_BLOCKS, PrefixLog

_MAX_CHANGED_BLOCKS = 4 * MAX_DELTA_BLOCKS


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherConfig:
    """How much is written, and when."""

    interval_s: float = 0.2
    """Changes are gathered for so long."""
    max_deltas: int = 1024
    """After so many a snapshot replaces them."""
    min_replaced_blocks: int = 8192
    """So do as many blocks in deltas as the snapshot before them has, but not fewer than this: what is written at most
    doubles, and what is read is little more than what there is."""


class PrefixPublisher:
    """Keeps a worker's log while `run` runs; `Registration.accompany` runs it.

    A log begins with a snapshot of all blocks and goes on with those that have changed since, each as it is when its
    delta is written. Whoever has followed the log skips nothing when a later snapshot replaces deltas, so what is gone
    is told before. Belongs to the worker's event loop.
    """

    def __init__(
        self,
        client: EtcdClient,
        cluster: str,
        worker_id: str,
        blocks: HeldBlocks,
        config: PublisherConfig | None = None,
    ) -> None:
        self._client = client
        self._cluster = cluster
        self._worker_id = worker_id
        self._blocks = blocks
        self._config = config or PublisherConfig()
        self._changed: dict[bytes, None] = {}
        self._is_overrun = False
        """Whether more has changed than `_changed` says."""
        self._has_news = asyncio.Event()
        blocks.notify(self._on_changed)

    async def run(self, lease: Lease) -> Never:
        """Write a log under a lease until cancelled.

        Raises `LeaseLostError` when etcd says that the lease is gone, and when more has changed than is kept while etcd
        took nothing: another log begins with all that is there.
        """
        log = PrefixLog(self._client, self._cluster, self._worker_id, lease)
        self._take_changed()
        await log.replace(self._blocks.hashes())
        while True:
            await self._has_news.wait()
            await asyncio.sleep(self._config.interval_s)
            if self._is_overrun:
                raise LeaseLostError(lease.lease_id)
            changed = self._take_changed()
            for start in range(0, len(changed), MAX_DELTA_BLOCKS):
                await self._append(log, changed[start : start + MAX_DELTA_BLOCKS])
            if self._is_long(log):
                await log.replace(self._blocks.hashes())

    async def _append(self, log: PrefixLog, changed: Sequence[bytes]) -> None:
        added = [block_hash for block_hash in changed if block_hash in self._blocks]
        removed = [block_hash for block_hash in changed if block_hash not in self._blocks]
        await log.append(added, removed)

    def _on_changed(self, block_hash: bytes) -> None:
        self._has_news.set()
        if len(self._changed) < _MAX_CHANGED_BLOCKS:
            self._changed[block_hash] = None
        elif block_hash not in self._changed:
            self._is_overrun = True

    def _take_changed(self) -> list[bytes]:
        changed = list(self._changed)
        self._changed.clear()
        self._is_overrun = False
        self._has_news.clear()
        return changed

    def _is_long(self, log: PrefixLog) -> bool:
        replaced = max(log.num_snapshot_blocks, self._config.min_replaced_blocks)
        return log.num_deltas >= self._config.max_deltas or log.num_delta_blocks >= replaced

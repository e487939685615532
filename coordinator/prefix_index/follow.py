"""How does a coordinator's prefix index follow what workers write to etcd?"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Never

from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.logs import LogEntry, PrefixLogs
from kvrelay.etcd import EtcdClient
from kvrelay.etcd.follow import DEFAULT_ABSENCE_GRACE_S, follow_prefix, in_slices
from kvrelay.etcd.rpc_pb2 import Event, KeyValue
from kvrelay.membership.records import decode, prefix_logs_prefix
from kvrelay.v1 import cluster_pb2

logger = logging.getLogger(__name__)

_TEND_INTERVAL_S = 1.0
_PAGE_KEYS = 200
"""Of 256 KiB at most (`worker/prefix_publisher.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixFigures:
    """What the index holds, and how well it follows etcd."""

    num_blocks: int
    """Different ones."""
    num_entries: int
    """Pairs of a worker and a block that it has."""
    num_speculated: int
    """Of the entries, those that are promised only."""
    size_bytes: int
    lag_s: float
    """From when the newest delta was published until it was applied."""
    num_rebuilds: int
    """How often everything was read again, after a compaction or because etcd held another store."""
    num_etcd_keys: int
    etcd_bytes: int
    """Of the values of these keys."""
    num_writes: int
    """Deltas seen coming in."""
    writes_per_s: float
    """Of the last second or so."""


class PrefixReplica:
    """Makes an index of the keys that workers write, while `follow` runs."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self._logs = PrefixLogs(index)
        self._prefix = b""
        self._absent: set[str] = set()
        self._num_listings = 0
        self._num_writes = 0
        self._writes_per_s = 0.0

    async def follow(self, client: EtcdClient, cluster: str, absence_grace_s: float = DEFAULT_ABSENCE_GRACE_S) -> Never:
        """Until cancelled; run it as a task. As `follow_workers`: whoever is missing after a gap has a grace."""
        self._prefix = prefix_logs_prefix(cluster)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tend(), name="tend the prefix index")
            await follow_prefix(client, self._prefix, self, absence_grace_s=absence_grace_s, page_keys=_PAGE_KEYS)

    def replace(self, entries: Sequence[KeyValue]) -> Iterator[None]:
        """Take a whole listing. Workers that it lacks keep what they have until `drop_absent`."""
        self._num_listings += 1
        listed = self._newest_logs(entries)
        for worker_id, (name, kvs) in listed.items():
            yield from self._logs.restore(worker_id, name, [_log_entry(sequence, kv) for sequence, kv in kvs])
            yield
        self._absent = set(self._logs.workers - listed.keys())

    def apply(self, events: Sequence[Event]) -> Iterator[None]:
        """Take changes in order."""
        for event in events:
            place = self._place(event.kv)
            if place is None:
                continue
            worker_id, name, sequence = place
            if event.type == Event.PUT:
                self._num_writes += 1
                self._absent.discard(worker_id)
                yield from self._logs.put(worker_id, name, _log_entry(sequence, event.kv))
            else:
                self._logs.delete(worker_id, name, sequence)
            yield

    def drop_absent(self) -> None:
        """Whoever is still absent is gone."""
        for worker_id in self._absent:
            self._logs.drop(worker_id)
        self._absent = set()

    def figures(self) -> PrefixFigures:
        """Of this moment; takes milliseconds."""
        index, logs = self.index, self._logs
        return PrefixFigures(
            num_blocks=index.num_blocks,
            num_entries=index.num_entries,
            num_speculated=index.num_speculated,
            size_bytes=index.size_bytes,
            lag_s=logs.lag_s,
            num_rebuilds=max(0, self._num_listings - 1),
            num_etcd_keys=logs.num_deltas,
            etcd_bytes=logs.size_bytes,
            num_writes=self._num_writes,
            writes_per_s=self._writes_per_s,
        )

    async def _tend(self) -> None:
        """Let go of what was promised and has not come, give space back, measure."""
        num_writes, since_s = self._num_writes, time.monotonic()
        while True:
            await asyncio.sleep(_TEND_INTERVAL_S)
            now_s = time.monotonic()
            self.index.expire(now_s)
            self._writes_per_s = (self._num_writes - num_writes) / (now_s - since_s)
            num_writes, since_s = self._num_writes, now_s
            await in_slices(iter(self.index.sweep, False))

    def _newest_logs(self, entries: Sequence[KeyValue]) -> dict[str, tuple[str, list[tuple[int, KeyValue]]]]:
        """Of each worker the log that was begun last, in order."""
        logs: dict[str, dict[str, list[tuple[int, KeyValue]]]] = {}
        for kv in entries:
            if place := self._place(kv):
                worker_id, name, sequence = place
                logs.setdefault(worker_id, {}).setdefault(name, []).append((sequence, kv))
        return {worker_id: max(named.items(), key=_last_written) for worker_id, named in logs.items()}

    def _place(self, kv: KeyValue) -> tuple[str, str, int] | None:
        """Worker, log and sequence; None, and a line in the log, for a key that does not say them."""
        try:
            worker_id, name, sequence = kv.key.removeprefix(self._prefix).decode().split("/")
            return worker_id, name, int(sequence, 16)
        except ValueError:
            logger.error("%r is not the key of a prefix delta", kv.key)
            return None


def _log_entry(sequence: int, kv: KeyValue) -> LogEntry:
    delta = decode(kv, cluster_pb2.PrefixDelta) or cluster_pb2.PrefixDelta()
    return LogEntry(sequence, delta, len(kv.value))


def _last_written(log: tuple[str, list[tuple[int, KeyValue]]]) -> int:
    return max(kv.mod_revision for _, kv in log[1])

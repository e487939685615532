"""What does each worker say it has, in the log that it keeps in etcd?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.keys import packed_keys
from kvrelay.v1 import cluster_pb2

_SLICE_BLOCKS = 4096
"""Takes about a millisecond."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One delta of a log, under its key."""

    sequence: int
    delta: cluster_pb2.PrefixDelta
    size_bytes: int
    """In etcd."""


@dataclass(slots=True)
class _Log:
    name: str
    superseded: str = ""
    """The worker's log before this one, whose last writes may still be on their way."""
    last_sequence: int = -1
    sizes_bytes: dict[int, int] = field(default_factory=dict)
    """Of the deltas that are in etcd, by their sequence."""


class PrefixLogs:
    """Applies logs of workers to an index. No I/O.

    A worker has one log at a time; a new one begins with all that the worker has. Deltas of a log come in order, and
    what is applied of a log stays applied when later deltas replace earlier ones. Iterators do a part of the work
    whenever their next item is asked for.
    """

    def __init__(self, index: PrefixIndex, unix_ns: Callable[[], int] = time.time_ns) -> None:
        self._index = index
        self._unix_ns = unix_ns
        self._logs: dict[str, _Log] = {}
        self.lag_s = 0.0
        """From when the newest delta was published until it was applied."""

    @property
    def workers(self) -> frozenset[str]:
        """Those that have a log."""
        return frozenset(self._logs)

    @property
    def num_deltas(self) -> int:
        """Now in etcd."""
        return sum(len(log.sizes_bytes) for log in self._logs.values())

    @property
    def size_bytes(self) -> int:
        """Of the deltas in etcd."""
        return sum(sum(log.sizes_bytes.values()) for log in self._logs.values())

    def put(self, worker_id: str, name: str, entry: LogEntry) -> Iterator[None]:
        """A delta was written just now."""
        log = self._logs.get(worker_id)
        if log is None or name not in (log.name, log.superseded):
            yield from self._build(worker_id, name, [entry])
        elif log.name == name:
            log.sizes_bytes[entry.sequence] = entry.size_bytes
            yield from self._apply_new(worker_id, log, [entry])
        self.lag_s = max(0.0, (self._unix_ns() - entry.delta.published_unix_ns) / 1e9)

    def delete(self, worker_id: str, name: str, sequence: int) -> None:
        """A delta was deleted; with the last one of its log the worker has nothing any more."""
        log = self._logs.get(worker_id)
        if log is not None and log.name == name:
            log.sizes_bytes.pop(sequence, None)
            if not log.sizes_bytes:
                self.drop(worker_id)

    def restore(self, worker_id: str, name: str, entries: Sequence[LogEntry]) -> Iterator[None]:
        """Take a worker's log as it is in etcd now, in order; at least one delta.

        Where deltas were missed, what the worker had counts until all is read again.
        """
        log = self._logs.get(worker_id)
        if log is None or log.name != name or entries[0].sequence > log.last_sequence + 1:
            yield from self._build(worker_id, name, entries)
        else:
            log.sizes_bytes = _sizes_bytes(entries)
            yield from self._apply_new(worker_id, log, entries)

    def drop(self, worker_id: str) -> None:
        """The worker's log is gone."""
        if self._logs.pop(worker_id, None) is not None:
            self._index.drop(worker_id)

    def _build(self, worker_id: str, name: str, entries: Sequence[LogEntry]) -> Iterator[None]:
        """Beside what the worker had, which then is exchanged."""
        known = self._logs.get(worker_id)
        log = _Log(name, known.name if known else "", entries[-1].sequence, _sizes_bytes(entries))
        builder = f"{worker_id}/{name}"  # No worker's id has a slash.
        for entry in entries:
            yield from self._apply(builder, entry.delta)
        self._index.replace(worker_id, by=builder)
        self._logs[worker_id] = log

    def _apply_new(self, worker_id: str, log: _Log, entries: Sequence[LogEntry]) -> Iterator[None]:
        for entry in entries:
            if entry.sequence > log.last_sequence:
                yield from self._apply(worker_id, entry.delta)
                log.last_sequence = entry.sequence

    def _apply(self, worker_id: str, delta: cluster_pb2.PrefixDelta) -> Iterator[None]:
        for packed, change in ((delta.added, self._index.add), (delta.removed, self._index.remove)):
            keys = packed_keys(packed)
            for start in range(0, len(keys), _SLICE_BLOCKS):
                change(worker_id, keys[start : start + _SLICE_BLOCKS])
                yield


def _sizes_bytes(entries: Sequence[LogEntry]) -> dict[int, int]:
    return {entry.sequence: entry.size_bytes for entry in entries}

"""How does a process know who is in the cluster at any time?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Generic, Never, Protocol, TypeVar

from google.protobuf.message import Message

from kvrelay.etcd import EtcdClient, EtcdError, Listing, WatchOutdatedError
from kvrelay.etcd.rpc_pb2 import Event, KeyValue
from kvrelay.etcd.transport import Backoff
from kvrelay.membership.records import coordinators_prefix, decode, workers_prefix
from kvrelay.v1 import cluster_pb2

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT", bound=Message)
RecordT_contra = TypeVar("RecordT_contra", bound=Message, contravariant=True)

DEFAULT_ABSENCE_GRACE_S = 10.0


class Members(Protocol[RecordT_contra]):
    """Who hears of changes, in the event loop. Must not block."""

    def join(self, record: RecordT_contra, /) -> None:
        """An id that was not there before."""

    def update(self, record: RecordT_contra, /) -> None:
        """A known id has another record, perhaps of another process."""

    def leave(self, member_id: str, /) -> None:
        """A known id is gone."""


async def follow_workers(
    client: EtcdClient,
    cluster: str,
    members: Members[cluster_pb2.WorkerInfo],
    *,
    absence_grace_s: float = DEFAULT_ABSENCE_GRACE_S,
    on_connected: Callable[[bool], None] | None = None,
) -> Never:
    """Tell `members` of every change until cancelled; run it as a task.

    While etcd is away the last known state stays. A member that is missing when etcd is back with another store or
    after a compaction has `absence_grace_s`, counted while etcd is there, to register again before it counts as gone.
    `on_connected` hears whether the picture is up to date. Raises `EtcdError` when etcd refuses the watch.
    """
    prefix = workers_prefix(cluster)
    await _follow(client, prefix, cluster_pb2.WorkerInfo, members, absence_grace_s, on_connected)


async def follow_coordinators(
    client: EtcdClient,
    cluster: str,
    members: Members[cluster_pb2.CoordinatorInfo],
    *,
    absence_grace_s: float = DEFAULT_ABSENCE_GRACE_S,
    on_connected: Callable[[bool], None] | None = None,
) -> Never:
    """As `follow_workers`, for coordinators."""
    prefix = coordinators_prefix(cluster)
    await _follow(client, prefix, cluster_pb2.CoordinatorInfo, members, absence_grace_s, on_connected)


class MemberTable(Generic[RecordT]):
    """Turns listings and events into joins, updates and leaves. No I/O."""

    def __init__(self, prefix: bytes, record_type: type[RecordT], members: Members[RecordT]) -> None:
        self._prefix = prefix
        self._record_type = record_type
        self._members = members
        self._known: dict[str, bytes] = {}
        self.absent: set[str] = set()
        """Known members that the last listing lacked."""

    def replace(self, entries: Iterable[KeyValue]) -> None:
        """Take a whole listing. Members that it lacks become `absent`; they have not left yet."""
        listed = {self._id(entry): entry for entry in entries}
        for entry in listed.values():
            self._put(entry)
        self.absent = self._known.keys() - listed.keys()

    def apply(self, events: Sequence[Event]) -> None:
        """Take changes in order."""
        for event in events:
            if event.type == Event.PUT:
                self._put(event.kv)
            else:
                self._drop(self._id(event.kv))

    def drop_absent(self) -> None:
        """Whoever is still absent has left."""
        for member_id in sorted(self.absent):
            self._drop(member_id)

    def _put(self, entry: KeyValue) -> None:
        member_id = self._id(entry)
        self.absent.discard(member_id)
        record = decode(entry, self._record_type)
        if record is None or self._known.get(member_id) == entry.value:
            return
        is_new = member_id not in self._known
        self._known[member_id] = entry.value
        if is_new:
            self._members.join(record)
        else:
            self._members.update(record)

    def _drop(self, member_id: str) -> None:
        self.absent.discard(member_id)
        if self._known.pop(member_id, None) is not None:
            self._members.leave(member_id)

    def _id(self, entry: KeyValue) -> str:
        return entry.key.removeprefix(self._prefix).decode(errors="replace")


class _AbsenceTimer:
    """Calls back once a connection to etcd has lasted for the grace."""

    def __init__(self, grace_s: float, callback: Callable[[], None]) -> None:
        self._grace_s = grace_s
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def on_connected(self, connected: bool) -> None:
        self.cancel()
        if connected:
            self._handle = asyncio.get_running_loop().call_later(self._grace_s, self._callback)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


async def _follow(
    client: EtcdClient,
    prefix: bytes,
    record_type: type[RecordT],
    members: Members[RecordT],
    absence_grace_s: float,
    on_connected: Callable[[bool], None] | None,
) -> Never:
    table = MemberTable(prefix, record_type, members)
    timer = _AbsenceTimer(absence_grace_s, table.drop_absent)

    def announce(connected: bool) -> None:
        timer.on_connected(connected)
        if on_connected is not None:
            on_connected(connected)

    while True:
        listing = await _list(client, prefix)
        table.replace(listing.entries)
        start, cluster_id = listing.revision + 1, listing.cluster_id
        watch = client.watch_prefix(prefix, start_revision=start, cluster_id=cluster_id, on_connected=announce)
        try:
            async with aclosing(watch):
                async for events in watch:
                    table.apply(events)
        except WatchOutdatedError as error:
            logger.warning("%s; listing %s again", error, prefix.decode())
            announce(False)
        finally:
            timer.cancel()


async def _list(client: EtcdClient, prefix: bytes) -> Listing:
    """However long etcd takes."""
    backoff = Backoff()
    while True:
        try:
            return await client.list_prefix(prefix)
        except EtcdError as error:
            logger.warning("cannot list %s yet: %s", prefix.decode(), error)
            await asyncio.sleep(backoff.next_s())

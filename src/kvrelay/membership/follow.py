"""How does a process know who is in the cluster at any time?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Never, Protocol, TypeVar

from google.protobuf.message import Message

from kvrelay.etcd import EtcdClient
from kvrelay.etcd.follow import DEFAULT_ABSENCE_GRACE_S, Steps, follow_prefix
from kvrelay.etcd.rpc_pb2 import Event, KeyValue
from kvrelay.membership.records import coordinators_prefix, decode, workers_prefix
from kvrelay.v1 import cluster_pb2

RecordT = TypeVar("RecordT", bound=Message)
RecordT_contra = TypeVar("RecordT_contra", bound=Message, contravariant=True)


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
    """Tell `members` of every change until cancelled; see `follow_prefix`."""
    table = MemberTable(workers_prefix(cluster), cluster_pb2.WorkerInfo, members)
    await follow_prefix(client, table.prefix, table, absence_grace_s=absence_grace_s, on_connected=on_connected)


async def follow_coordinators(
    client: EtcdClient,
    cluster: str,
    members: Members[cluster_pb2.CoordinatorInfo],
    *,
    absence_grace_s: float = DEFAULT_ABSENCE_GRACE_S,
    on_connected: Callable[[bool], None] | None = None,
) -> Never:
    """As `follow_workers`, for coordinators."""
    table = MemberTable(coordinators_prefix(cluster), cluster_pb2.CoordinatorInfo, members)
    await follow_prefix(client, table.prefix, table, absence_grace_s=absence_grace_s, on_connected=on_connected)


class MemberTable(Generic[RecordT]):
    """Turns listings and events into joins, updates and leaves. No I/O."""

    def __init__(self, prefix: bytes, record_type: type[RecordT], members: Members[RecordT]) -> None:
        self.prefix = prefix
        self._record_type = record_type
        self._members = members
        self._known: dict[str, bytes] = {}
        self.absent: set[str] = set()
        """Known members that the last listing lacked."""

    def replace(self, entries: Iterable[KeyValue]) -> Steps:
        """Take a whole listing. Members that it lacks become `absent`; they have not left yet."""
        listed = {self._id(entry): entry for entry in entries}
        for entry in listed.values():
            self._put(entry)
        self.absent = self._known.keys() - listed.keys()
        return ()

    def apply(self, events: Sequence[Event]) -> Steps:
        """Take changes in order."""
        for event in events:
            if event.type == Event.PUT:
                self._put(event.kv)
            else:
                self._drop(self._id(event.kv))
        return ()

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
        return entry.key.removeprefix(self.prefix).decode(errors="replace")

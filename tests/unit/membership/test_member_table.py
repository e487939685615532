"""Listings and events become joins, updates and leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest

from kvrelay.etcd.rpc_pb2 import Event, KeyValue
from kvrelay.membership import coordinators_prefix, worker_key, workers_prefix
from kvrelay.membership.follow import MemberTable
from kvrelay.v1 import cluster_pb2
from tests.support.recording_members import RecordingMembers

PREFIX = workers_prefix("c")


def _entry(worker_id: str, state: cluster_pb2.WorkerState.ValueType = cluster_pb2.WORKER_STATE_READY) -> KeyValue:
    info = cluster_pb2.WorkerInfo(worker_id=worker_id, state=state)
    return KeyValue(key=PREFIX + worker_id.encode(), value=info.SerializeToString())


def _entries(*worker_ids: str) -> Iterable[KeyValue]:
    return [_entry(worker_id) for worker_id in worker_ids]


def _deletion(worker_id: str) -> Event:
    return Event(type=Event.DELETE, kv=KeyValue(key=PREFIX + worker_id.encode()))


@pytest.fixture
def members() -> RecordingMembers:
    return RecordingMembers()


@pytest.fixture
def table(members: RecordingMembers) -> MemberTable[cluster_pb2.WorkerInfo]:
    return MemberTable(PREFIX, cluster_pb2.WorkerInfo, members)


def test_a_listing_joins(table: MemberTable[cluster_pb2.WorkerInfo], members: RecordingMembers) -> None:
    table.replace(_entries("a", "b"))
    assert members.calls == [("join", "a"), ("join", "b")]


def test_events_in_order(table: MemberTable[cluster_pb2.WorkerInfo], members: RecordingMembers) -> None:
    draining = Event(kv=_entry("a", cluster_pb2.WORKER_STATE_DRAINING))
    table.apply([Event(kv=_entry("a")), draining, _deletion("a"), Event(kv=_entry("a"))])
    assert members.calls == [("join", "a"), ("update", "a"), ("leave", "a"), ("join", "a")]


def test_the_same_record_again_is_no_news(
    table: MemberTable[cluster_pb2.WorkerInfo], members: RecordingMembers
) -> None:
    table.replace(_entries("a"))
    table.replace(_entries("a"))
    assert members.calls == [("join", "a")]


def test_a_stranger_does_not_leave(table: MemberTable[cluster_pb2.WorkerInfo], members: RecordingMembers) -> None:
    table.apply([_deletion("a")])
    assert members.calls == []


def test_absent_members_stay_until_dropped(
    table: MemberTable[cluster_pb2.WorkerInfo], members: RecordingMembers
) -> None:
    table.replace(_entries("a", "b", "c"))
    table.replace(_entries("b"))
    assert table.absent == {"a", "c"}
    assert members.current.keys() == {"a", "b", "c"}
    table.apply([Event(kv=_entry("c"))])
    table.drop_absent()
    assert members.current.keys() == {"b", "c"}


def test_unreadable_values_are_skipped(
    table: MemberTable[cluster_pb2.WorkerInfo], members: RecordingMembers, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        table.replace([KeyValue(key=PREFIX + b"x", value=b"\xff\xff"), _entry("a")])
    assert members.calls == [("join", "a")]
    assert "/kvrelay/c/workers/x" in caplog.text


def test_keys() -> None:
    assert worker_key("c", "w-1") == b"/kvrelay/c/workers/w-1"
    assert coordinators_prefix("c") == b"/kvrelay/c/coordinators/"


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_with_a_slash_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="slash"):
        worker_key("c", name)
    with pytest.raises(ValueError, match="slash"):
        workers_prefix(name)

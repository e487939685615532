"""A watch neither loses nor doubles an event."""

from __future__ import annotations

import pytest

from kvrelay.etcd import EtcdUnavailableError, WatchOutdatedError
from kvrelay.etcd.rpc_pb2 import Event, KeyValue, ResponseHeader, WatchResponse
from kvrelay.etcd.watch import WatchPosition


def _header(revision: int, cluster_id: int = 7) -> ResponseHeader:
    return ResponseHeader(revision=revision, cluster_id=cluster_id)


def _events(*revisions: int, fragment: bool = False) -> WatchResponse:
    events = [Event(kv=KeyValue(key=b"k%d" % revision, mod_revision=revision)) for revision in revisions]
    return WatchResponse(header=_header(revisions[-1] + 50), events=events, fragment=fragment)


def _revisions(events: list[Event]) -> list[int]:
    return [event.kv.mod_revision for event in events]


def test_resumes_behind_the_last_event_not_at_the_header() -> None:
    position = WatchPosition(5, 7)
    assert _revisions(position.take(_events(5, 6, 9))) == [5, 6, 9]
    assert position.next_revision == 10


def test_drops_events_that_were_delivered_before_the_reconnect() -> None:
    position = WatchPosition(5, 7)
    position.take(_events(5, 6))
    position.begin()
    assert _revisions(position.take(_events(6, 7))) == [7]


def test_keeps_all_events_of_one_revision() -> None:
    position = WatchPosition(5, 7)
    assert _revisions(position.take(_events(5, 5, 5))) == [5, 5, 5]


def test_joins_fragments() -> None:
    position = WatchPosition(5, 7)
    assert position.take(_events(5, 6, fragment=True)) == []
    assert _revisions(position.take(_events(6, 7))) == [5, 6, 6, 7]


def test_forgets_fragments_of_a_broken_stream() -> None:
    position = WatchPosition(5, 7)
    position.take(_events(5, 6, fragment=True))
    position.begin()
    assert _revisions(position.take(_events(5, 6, 7))) == [5, 6, 7]


def test_an_announcement_without_events_moves_nothing() -> None:
    position = WatchPosition(5, 7)
    assert position.take(WatchResponse(header=_header(99))) == []
    assert position.next_revision == 5


def test_compaction_is_outdated() -> None:
    with pytest.raises(WatchOutdatedError, match="revision 5 is compacted; 8 is the oldest"):
        WatchPosition(5, 7).take(WatchResponse(header=_header(9), canceled=True, compact_revision=8))


@pytest.mark.parametrize("header", [_header(3), _header(30, cluster_id=8)], ids=["older", "other cluster"])
def test_another_store_is_outdated(header: ResponseHeader) -> None:
    with pytest.raises(WatchOutdatedError, match="another store"):
        WatchPosition(5, 7).take(WatchResponse(header=header, created=True))


def test_the_store_right_before_the_first_event_is_the_same_store() -> None:
    assert WatchPosition(5, 7).take(WatchResponse(header=_header(4), created=True)) == []


def test_a_cancelled_watch_is_tried_again() -> None:
    with pytest.raises(EtcdUnavailableError, match="no leader"):
        WatchPosition(5, 7).take(WatchResponse(header=_header(9), canceled=True, cancel_reason="no leader"))

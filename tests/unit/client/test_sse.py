"""Server-sent events, in whatever pieces they come."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.client.sse import EventParser, EventTooLargeError

_DATA = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b""))


def fed(stream: bytes, cuts: list[int]) -> list[bytes]:
    parser = EventParser()
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [event for start, end in itertools.pairwise(edges) for event in parser.feed(stream[start:end])]


@given(st.lists(st.lists(_DATA, min_size=1, max_size=3)), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0)))
def test_events_are_the_same_however_they_are_cut(events: list[list[bytes]], end: bytes, cuts: list[int]) -> None:
    stream = b"".join(b"".join(b"data: " + line + end for line in lines) + end for lines in events)
    assert fed(stream, cuts) == [b"\n".join(lines) for lines in events]


@given(st.binary(max_size=200), st.lists(st.integers(0)))
def test_any_bytes_give_the_same_events_however_they_are_cut(stream: bytes, cuts: list[int]) -> None:
    assert fed(stream, cuts) == fed(stream, [])


def test_comments_and_other_fields_are_passed_over() -> None:
    assert fed(b": ping\n\nevent: x\nid: 7\ndata:a\n\nretry: 9\n\n", []) == [b"a"]


def test_an_event_that_was_not_ended_is_none() -> None:
    assert fed(b"data: a\n\ndata: b\n", []) == [b"a"]


def test_only_one_space_belongs_to_the_field() -> None:
    assert fed(b"data:  a \n\n", []) == [b" a "]


def test_an_event_without_end_is_refused() -> None:
    with pytest.raises(EventTooLargeError, match="larger than"):
        fed((b"data: " + b"x" * (1 << 20) + b"\n") * 17, [1 << 20, 1 << 23])

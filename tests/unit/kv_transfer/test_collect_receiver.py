"""Every run of a stream is placed and answered in its order, or lost with the group; a stream that is none ends it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer.collect_receiver import MAX_RUN_BYTES, receive_runs
from kvrelay.kv_transfer.collective_group import RUN_BYTES, Group, GroupError, Staging, Transit
from kvrelay.kv_transfer.wire import FrameHeader
from kvrelay.v1.kv_transfer_pb2 import COLLECTIVE_BACKEND_GLOO, CollectiveGroup, CollectRun, FrameAck

STORED, LOST = FrameAck.STATUS_STORED, FrameAck.STATUS_LOST
GROUP = CollectRun(group=CollectiveGroup(backend=COLLECTIVE_BACKEND_GLOO, group_id=1))
LAST = CollectRun(is_last=True)


class MemoryGroup(Group):
    """Run `i` brings bytes of value `i`; the runs named fail when they are posted, or when they are waited for."""

    def __init__(self, fails_at_post: Iterable[int] = (), fails_at_wait: Iterable[int] = ()) -> None:
        self.fails_at_post, self.fails_at_wait = set(fails_at_post), set(fails_at_wait)
        self.num_posted = self.num_under_way = self.most_under_way = 0
        self.next_is_posted = threading.Event()
        self.stagings: list[int] = []
        self.is_closed = False

    def staging(self, num_bytes: int) -> Staging:
        self.stagings.append(num_bytes)
        return Staging(np.zeros(num_bytes, np.uint8))

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        number, self.num_posted = self.num_posted, self.num_posted + 1
        if number in self.fails_at_post:
            raise GroupError("cannot post")
        if number - 1 in self.fails_at_wait:
            self.next_is_posted.set()
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)

        def wait() -> None:
            self.num_under_way -= 1
            if number in self.fails_at_wait:
                assert self.next_is_posted.wait(2), "another run is under way meanwhile"
                raise GroupError("lost")
            staging.host[:num_bytes] = number

        return wait

    def send(self, staging: Staging, num_bytes: int) -> Transit:
        raise AssertionError("a receiver sends nothing")

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Rig:
    """Collectives with one group, and a receiver that keeps what it is given."""

    group: MemoryGroup = field(default_factory=MemoryGroup)
    placed: list[tuple[int, bytes]] = field(default_factory=list)

    @contextlib.contextmanager
    def as_receiver(self, _group: CollectiveGroup) -> Iterator[Group]:
        yield self.group

    def place(self, header: FrameHeader, payload: memoryview) -> int:
        self.placed.append((header.first_block, bytes(payload)))
        return STORED

    def receive(self, messages: Iterable[CollectRun]) -> list[tuple[int, int]]:
        """Block and status of every run."""
        return [(header.first_block, status) for header, status in receive_runs(iter(messages), self, self)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-collect-reader"]


def run(block: int, num_bytes: int = 3) -> CollectRun:
    return CollectRun(transfer_id=9, first_block=block, num_blocks=1, num_layers=1, num_bytes=num_bytes)


@given(sizes=st.lists(st.integers(1, 40), max_size=12))
def test_every_run_is_placed_in_its_order_from_two_stagings(sizes: list[int]) -> None:
    rig = Rig()
    statuses = rig.receive([GROUP, *(run(block, size) for block, size in enumerate(sizes)), LAST])
    assert statuses == [(block, STORED) for block in range(len(sizes))]
    assert rig.placed == [(block, bytes([block]) * size) for block, size in enumerate(sizes)]
    assert rig.group.stagings == [RUN_BYTES, RUN_BYTES]
    assert rig.group.most_under_way <= 2
    assert rig.group.is_closed


def test_a_run_larger_than_a_staging_gets_one_of_its_size() -> None:
    rig = Rig()
    assert rig.receive([GROUP, run(0, RUN_BYTES + 1), LAST]) == [(0, STORED)]
    assert rig.placed == [(0, bytes(RUN_BYTES + 1))]
    assert rig.group.stagings == [RUN_BYTES, RUN_BYTES, RUN_BYTES + 1]


@pytest.mark.parametrize(
    "group", [MemoryGroup(fails_at_wait={1}), MemoryGroup(fails_at_post={1})], ids=["wait", "post"]
)
def test_after_a_run_has_failed_all_are_lost_and_none_is_placed(group: MemoryGroup) -> None:
    rig = Rig(group)
    statuses = rig.receive([GROUP, *map(run, range(5)), LAST])
    assert [block for block, _ in statuses] == list(range(5))
    num_placed = len(rig.placed)
    assert num_placed <= 1
    assert [status for _, status in statuses] == [STORED] * num_placed + [LOST] * (5 - num_placed)
    assert group.is_closed


@pytest.mark.parametrize("num_bytes", [0, MAX_RUN_BYTES + 1])
def test_a_run_without_bytes_or_with_too_many_ends_the_stream(num_bytes: int) -> None:
    rig = Rig()
    with pytest.raises(ValueError, match=f"a run of {num_bytes} bytes"):
        rig.receive([GROUP, run(0, num_bytes), LAST])
    assert rig.group.is_closed
    assert (rig.group.num_posted, rig.group.stagings) == (0, [RUN_BYTES, RUN_BYTES])


def test_a_stream_that_only_stops_is_broken() -> None:
    rig = Rig()
    with pytest.raises(ConnectionError, match="ended early"):
        rig.receive([GROUP, run(0)])
    assert rig.group.is_closed


def test_the_senders_end_is_told_as_it_is() -> None:
    def messages() -> Iterator[CollectRun]:
        yield from (GROUP, run(0))
        raise TimeoutError("the sender is gone")

    rig = Rig()
    with pytest.raises(TimeoutError, match="is gone"):
        rig.receive(messages())
    assert rig.group.is_closed


def test_a_stream_names_its_group_first_or_says_nothing() -> None:
    assert Rig().receive([]) == []
    with pytest.raises(ValueError, match="names its group"):
        Rig().receive([run(0), LAST])


def test_whoever_stops_reading_statuses_ends_the_group_and_its_thread() -> None:
    rig = Rig()
    statuses = receive_runs(iter([GROUP, *map(run, range(9)), LAST]), rig, rig)
    assert next(statuses)[1] == STORED
    statuses.close()  # type: ignore[attr-defined]
    assert rig.group.is_closed

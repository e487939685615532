"""What a stream tells its sender, what it remembers, and which transfers end with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, cast

import grpc
import pytest

from kvrelay.kv_transfer import push_server
from kvrelay.kv_transfer.push_server import _MAX_UNTOLD, PushServer
from kvrelay.kv_transfer.wire import FrameHeader, encode_frame
from kvrelay.v1.kv_transfer_pb2 import FrameAck, LocalRun

STORED = FrameAck.STATUS_STORED
LAST = encode_frame(FrameHeader(0, 0, 0, 0, 0, is_last=1), ())
LAST_RUN = LocalRun(is_last=True)


class Receiver:
    """Takes everything, for transfers that are open until `over` says otherwise."""

    max_payload_bytes = 1000

    def __init__(self) -> None:
        self.opened: set[int] = set()
        self.over: set[int] = set()
        self.broken: list[int] = []
        self.num_announced = 0
        self.status: FrameAck.Status.ValueType = STORED

    def place(self, header: FrameHeader, _payload: memoryview) -> FrameAck.Status.ValueType:
        self.opened.add(header.transfer_id)
        return self.status

    def copy(self, run: LocalRun) -> FrameAck.Status.ValueType:
        self.opened.add(run.transfer_id)
        return self.status

    def announce(self) -> None:
        self.num_announced += 1

    def open_transfers(self) -> set[int]:
        return self.opened - self.over

    def stream_broke(self, transfer_ids: Iterable[int]) -> None:
        self.broken += sorted(transfer_ids)


class AbortedError(Exception):
    pass


class Context:
    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise AbortedError(f"{code.name}: {details}")


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def server(receiver: Receiver) -> PushServer:
    return PushServer(cast("Any", receiver))


CONTEXT = cast("grpc.ServicerContext", Context())


def frame(transfer_id: int, *, ack_now: int = 0, block: int = 0) -> bytes:
    return encode_frame(FrameHeader(transfer_id, block, 1, 0, 1, ack_now), [b"x"])


def acks_of(server: PushServer, frames: Iterable[bytes]) -> list[list[int]]:
    """The blocks that each message acknowledges."""
    return [[ack.first_block for ack in acks.acks] for acks in server.push(iter(frames), CONTEXT)]


def test_acks_come_when_a_frame_asks_and_at_the_end(server: PushServer, receiver: Receiver) -> None:
    frames = [frame(1, block=i, ack_now=i == 2) for i in range(5)]
    assert acks_of(server, [*frames, LAST]) == [[0, 1, 2], [3, 4]]
    assert receiver.num_announced == 2, "the event loop hears of blocks when their sender does"
    assert receiver.broken == []


def test_acks_go_out_unasked_before_they_are_many(server: PushServer, receiver: Receiver) -> None:
    sent: list[int] = []

    def frames() -> Iterator[bytes]:
        for block in range(2 * _MAX_UNTOLD + 1):
            sent.append(block)
            yield frame(1, block=block)
        yield LAST

    told = server.push(frames(), CONTEXT)
    for part in (0, 1):
        assert [ack.first_block for ack in next(told).acks] == list(range(part * _MAX_UNTOLD, (part + 1) * _MAX_UNTOLD))
        assert len(sent) == (part + 1) * _MAX_UNTOLD, "not later"
    assert [[ack.first_block for ack in acks.acks] for acks in told] == [[2 * _MAX_UNTOLD]]


def test_what_did_not_land_is_told_at_once(server: PushServer, receiver: Receiver) -> None:
    receiver.status = FrameAck.STATUS_CORRUPT
    assert acks_of(server, [frame(1, block=0), frame(1, block=1), LAST]) == [[0], [1]]


@pytest.mark.parametrize("ack_now", [0, 1])
def test_a_push_that_ends_without_saying_so_is_broken(server: PushServer, receiver: Receiver, ack_now: int) -> None:
    """A sender that was killed looks like this to gRPC now and then."""
    with pytest.raises(AbortedError, match=r"ABORTED.*last message"):
        acks_of(server, [frame(1), frame(2, ack_now=ack_now)])
    assert receiver.broken == [1, 2]


def test_a_copy_that_ends_without_saying_so_is_broken(server: PushServer, receiver: Receiver) -> None:
    runs = [LocalRun(transfer_id=1, num_layers=1, slots=[0])]
    with pytest.raises(AbortedError, match=r"ABORTED.*last message"):
        list(server.copy(iter(runs), CONTEXT))
    assert receiver.broken == [1]


def test_a_stream_that_ends_in_order_ends_no_transfer(server: PushServer, receiver: Receiver) -> None:
    runs = [LocalRun(transfer_id=1, num_layers=1, slots=[0]), LAST_RUN]
    assert len(list(server.copy(iter(runs), CONTEXT))) == 1
    acks_of(server, [frame(2, ack_now=1), LAST])
    assert receiver.broken == []


def test_garbage_ends_the_transfers_of_its_stream(server: PushServer, receiver: Receiver) -> None:
    with pytest.raises(AbortedError, match="INVALID_ARGUMENT"):
        acks_of(server, [frame(1), b"garbage"])
    assert receiver.broken == [1]


def test_a_stream_that_grpc_gives_up_ends_its_transfers(server: PushServer, receiver: Receiver) -> None:
    told = server.push(iter([frame(1, ack_now=1), LAST]), CONTEXT)
    next(told)
    cast("Any", told).close()
    assert receiver.broken == [1]


def test_a_stream_forgets_transfers_that_are_over_and_ends_the_others(
    server: PushServer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_server, "_MAX_NOTED", 4)

    def frames() -> Iterator[bytes]:
        yield frame(1)
        for transfer_id in range(2, 11):
            yield frame(transfer_id)
            receiver.over.add(transfer_id)
        yield frame(11)

    with pytest.raises(AbortedError):
        acks_of(server, frames())
    assert {1, 11} <= set(receiver.broken)
    assert len(receiver.broken) <= 4


def test_a_stream_remembers_all_transfers_that_are_open(
    server: PushServer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_server, "_MAX_NOTED", 4)
    with pytest.raises(AbortedError):
        acks_of(server, map(frame, range(1, 11)))
    assert receiver.broken == list(range(1, 11))

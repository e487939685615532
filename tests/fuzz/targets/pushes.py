"""Whatever a sender pushes, as frames, runs or runs through a group, no slot stays taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NoReturn, cast

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from kvrelay.kv_transfer.collective_group import Group, GroupError, Staging, Transit
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.wire import FrameError, FrameHeader, checksum, decode_frame, encode_frame
from kvrelay.v1.kv_transfer_pb2 import COLLECTIVE_BACKEND_GLOO, CollectiveGroup, CollectRun, LocalRun, LocalSegment
from tests.fuzz.target import BETWEEN, Check, Target, joined, pieces
from tests.support.receiver_rig import LAYER_BYTES, LAYERS, LAYOUT, NUM_SLOTS, Rig, content, name, open_rig

_OFFERED = [0, 1, 2]
_STREAMS = ("push", "copy", "collect")


class _AbortedError(Exception):
    """In place of gRPC's own."""


class _Context:
    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise _AbortedError(code, details)


class _Group(Group):
    """Whose runs bring the offered blocks, one after the other."""

    def staging(self, num_bytes: int) -> Staging:
        return Staging(np.zeros(num_bytes, np.uint8))

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        if num_bytes % 7 == 0:
            raise GroupError("broken")
        whole = b"".join(map(content, _OFFERED))
        staging.host[: min(num_bytes, len(whole))] = np.frombuffer(whole[:num_bytes], np.uint8)
        return lambda: None

    def send(self, staging: Staging, num_bytes: int) -> Transit:
        raise AssertionError("a receiver sends nothing")

    def abort(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


class _Collectives:
    @contextlib.contextmanager
    def as_receiver(self, group: CollectiveGroup) -> Iterator[Group]:
        if group.backend != COLLECTIVE_BACKEND_GLOO:
            raise GroupError("there is no invitation for such a group")
        yield _Group()


@contextlib.contextmanager
def _open() -> Iterator[Check]:
    """The sender's own segment lies beside the receiver's, and is on the same machine."""
    with open_rig() as rig, open_rig() as sender:
        for block in _OFFERED:
            sender.segment.slot_view(block)[:] = content(block)
        local = LocalSegment(path=sender.segment.path, proof=sender.segment.proof)
        assert rig.receiver.meet(local)
        yield lambda data: _check(rig, local, data)
        rig.receiver.neighbours.close()


def _check(rig: Rig, local: LocalSegment, data: bytes) -> None:
    """The first byte says what kind of stream it is, and whether its frames get the checksum that they should have."""
    if not data:
        return
    kind, repairs = _STREAMS[data[0] % 3], data[0] & 4 == 0
    hashes = b"".join(map(name, _OFFERED))
    transfers = [rig.receiver.offer(f"r{i}", LAYOUT, hashes, source=local.proof)[0] for i in range(2)]
    server = PushServer(rig.receiver, cast("Any", _Collectives()))
    messages = pieces(data[1:])
    with contextlib.suppress(_AbortedError, FrameError, DecodeError):
        for _ in _acks(server, kind, messages, transfers, repairs=repairs):
            pass
    for request in range(2):
        rig.receiver.commit(transfers[request])
        rig.receiver.cancel(f"r{request}")
    rig.assert_idle()
    rig.store.release(rig.store.reserve(NUM_SLOTS))  # The next input finds nothing stored.


def _acks(
    server: PushServer, kind: str, messages: list[bytes], transfers: list[int], *, repairs: bool
) -> Iterable[object]:
    context = cast("grpc.ServicerContext", _Context())
    if kind == "push":
        return server.push(_frames(messages, transfers, repairs=repairs), context)
    if kind == "copy":
        return server.copy(_runs(messages, transfers), context)
    return server.collect(_group_runs(messages, transfers, repairs=repairs), context)


def _frames(messages: list[bytes], transfers: list[int], *, repairs: bool) -> Iterator[bytes]:
    for message in messages:
        if repairs:
            header, payload = decode_frame(message)
            known = replace(header, transfer_id=_known(header.transfer_id, transfers))
            yield encode_frame(known, [payload])
        else:
            yield message


def _runs(messages: list[bytes], transfers: list[int]) -> Iterator[LocalRun]:
    for message in messages:
        run = LocalRun.FromString(message)
        run.transfer_id = _known(run.transfer_id, transfers)
        yield run


def _group_runs(messages: list[bytes], transfers: list[int], *, repairs: bool) -> Iterator[CollectRun]:
    for message in messages:
        run = CollectRun.FromString(message)
        run.num_bytes = min(run.num_bytes, 1 << 16) if run.num_bytes < 1 << 32 else run.num_bytes
        run.transfer_id = _known(run.transfer_id, transfers)
        if repairs:
            header = FrameHeader(run.transfer_id, run.first_block, run.num_blocks, run.first_layer, run.num_layers)
            run.checksum = checksum(header, [b"".join(map(content, _OFFERED))[: run.num_bytes]])
        yield run


def _known(transfer_id: int, transfers: list[int]) -> int:
    """One that is open for most numbers: nobody guesses them."""
    return transfers[transfer_id % 2] if transfer_id % 8 else transfer_id


def _seeds() -> Iterator[bytes]:
    frames = [encode_frame(FrameHeader(1, block, 1, 0, LAYERS), [content(block)]) for block in _OFFERED]
    last = encode_frame(FrameHeader(0, 0, 0, 0, 0, is_last=1), ())
    ask = encode_frame(FrameHeader(0, 0, 0, 0, 0, ack_now=1), ())
    yield b"\0" + joined([*frames, ask, last])
    yield b"\0" + joined([encode_frame(FrameHeader(2, 0, 3, 0, LAYERS), [b"".join(map(content, _OFFERED))]), last])
    halves = [encode_frame(FrameHeader(1, 1, 1, layer, 1), [content(1, layer)]) for layer in range(LAYERS)]
    yield b"\0" + joined([*halves, *halves, last])
    yield b"\6" + joined(frames)
    runs = [LocalRun(transfer_id=1, first_block=0, num_layers=LAYERS, slots=[0, 1, 2], generations=[0, 0, 0])]
    yield b"\1" + joined([*(run.SerializeToString() for run in runs), LocalRun(is_last=True).SerializeToString()])
    group = CollectRun(group=CollectiveGroup(backend=COLLECTIVE_BACKEND_GLOO, group_id=1))
    whole = CollectRun(transfer_id=1, num_blocks=3, num_layers=LAYERS, num_bytes=3 * LAYERS * LAYER_BYTES)
    yield b"\2" + joined(message.SerializeToString() for message in (group, whole, whole, CollectRun(is_last=True)))


TARGET = Target("pushes", "a Push, Copy or Collect stream", _open, _seeds, (BETWEEN,))

"""`decode_frame` takes what protobuf takes, and reads the same from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from google.protobuf.message import DecodeError

from kvrelay.kv_transfer.wire import FrameError, FrameHeader, decode_frame, encode_frame
from kvrelay.v1.kv_transfer_pb2 import Frame
from tests.fuzz.target import Target, plain


def _check(data: bytes) -> None:
    try:
        header, payload = decode_frame(data)
    except FrameError:
        return
    try:
        frame = Frame.FromString(data)
    except DecodeError:
        return  # Both may be strict: what protobuf does not take is caught by the checksum.
    theirs = FrameHeader(
        frame.transfer_id,
        frame.first_block,
        frame.num_blocks,
        frame.first_layer,
        frame.num_layers,
        frame.ack_now,
        frame.encoding,
        frame.is_last,
        frame.checksum,
    )
    ours = replace(header, ack_now=bool(header.ack_now), is_last=bool(header.is_last))
    assert (ours, bytes(payload)) == (theirs, frame.payload)
    again, same = decode_frame(encode_frame(header, [payload]))
    assert (again.transfer_id, again.layers, bytes(same)) == (header.transfer_id, header.layers, bytes(payload))


def _seeds() -> Iterator[bytes]:
    yield encode_frame(FrameHeader(1 << 63, 3, 2, 0, 30, ack_now=1, encoding=1), [b"payload"])
    yield encode_frame(FrameHeader(0, 0, 0, 0, 0, is_last=1), ())
    yield Frame(transfer_id=7, num_blocks=300, payload=b"x" * 300).SerializeToString()


TARGET = Target("frames", "one Frame", lambda: plain(_check), _seeds)

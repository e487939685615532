"""Frames encoded by hand are what protobuf itself writes and reads; whatever else comes raises FrameError."""

from __future__ import annotations

import contextlib
from dataclasses import astuple, replace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer.wire import FrameError, FrameHeader, checksum, decode_frame, encode_frame
from kvrelay.v1.kv_transfer_pb2 import Frame

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
BOOL = st.integers(0, 1)
HEADERS = st.builds(FrameHeader, UINT64, UINT32, UINT32, UINT32, UINT32, BOOL, st.integers(0, 2**31 - 1), BOOL)
PARTS = st.lists(st.binary(max_size=200), max_size=4)


def message(header: FrameHeader, payload: bytes) -> Frame:
    names = (
        "transfer_id",
        "first_block",
        "num_blocks",
        "first_layer",
        "num_layers",
        "ack_now",
        "encoding",
        "is_last",
        "checksum",
    )
    return Frame(**dict(zip(names, astuple(header), strict=True)), payload=payload)


def checked(header: FrameHeader, payload: bytes) -> FrameHeader:
    return replace(header, checksum=checksum(header, [payload]))


@given(HEADERS, PARTS)
def test_protobuf_reads_what_is_written(header: FrameHeader, parts: list[bytes]) -> None:
    payload = b"".join(parts)
    assert Frame.FromString(encode_frame(header, parts)) == message(checked(header, payload), payload)


@given(HEADERS, st.binary(max_size=500), UINT64)
def test_what_protobuf_wrote_is_read(header: FrameHeader, payload: bytes, checksum: int) -> None:
    header = replace(header, checksum=checksum)
    decoded, view = decode_frame(message(header, payload).SerializeToString())
    assert decoded == header
    assert bytes(view) == payload


@given(HEADERS, st.binary(max_size=50), st.data())
def test_a_bit_that_flips_is_noticed(header: FrameHeader, payload: bytes, data: st.DataObject) -> None:
    """In whatever field it is: the frame cannot be read, or its checksum differs, or it says the same."""
    encoded = encode_frame(header, [payload])
    damaged = bytearray(encoded)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded, view = decode_frame(bytes(damaged))
    except FrameError:
        return
    if checksum(decoded, [view]) == decoded.checksum:
        assert (decoded, bytes(view)) == (checked(header, payload), payload)


@given(HEADERS, st.binary(min_size=1, max_size=100), st.data())
def test_a_frame_that_is_cut_inside_its_payload_is_refused(
    header: FrameHeader, payload: bytes, data: st.DataObject
) -> None:
    encoded = encode_frame(header, [payload])
    with pytest.raises(FrameError):
        decode_frame(encoded[: -data.draw(st.integers(1, len(payload)))])


@given(st.binary(max_size=300))
def test_garbage_raises_nothing_but_frame_error(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        decode_frame(data)


@given(HEADERS, st.binary(max_size=20), st.data())
def test_a_damaged_frame_is_refused_or_read_as_protobuf_reads_it(
    header: FrameHeader, payload: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(encode_frame(header, [payload]))
    if damaged:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded, view = decode_frame(bytes(damaged))
    except FrameError:
        return
    try:
        expected = Frame.FromString(bytes(damaged))
    except DecodeError:
        pytest.fail(f"protobuf does not read {damaged.hex()}")
    expected.DiscardUnknownFields()
    assert message(decoded, bytes(view)) == expected


def test_fields_that_a_newer_peer_adds_are_skipped() -> None:
    encoded = encode_frame(FrameHeader(1, 2, 3, 4, 5, 1), [b"payload"])
    # Field 15 as varint, fixed64, bytes and fixed32.
    unknown = (
        bytes.fromhex("7801")
        + bytes.fromhex("79")
        + bytes(8)
        + bytes.fromhex("7a0161")
        + bytes.fromhex("7d")
        + bytes(4)
    )
    assert decode_frame(unknown + encoded + unknown) == decode_frame(encoded)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_block_beyond_uint32_cannot_be_sent(value: int) -> None:
    with pytest.raises(ValueError, match="frame"):
        encode_frame(FrameHeader(1, value, 1, 0, 1), [b"x"])


@given(HEADERS, PARTS)
def test_the_checksum_does_not_depend_on_the_parts(header: FrameHeader, parts: list[bytes]) -> None:
    joined = b"".join(parts)
    assert checksum(header, parts) == checksum(header, [joined]) == checksum(header, [memoryview(joined)])

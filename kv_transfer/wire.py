"""How is a Frame encoded without copying its payload twice? By hand, in protobuf's own wire format.

A generated message copies its `bytes` field into itself and again when it serializes. Here the header's fields
are written by hand and the payload follows; what goes over the wire is exactly `kvrelay.v1.Frame`
(https://protobuf.dev/programming-guides/encoding/), so any protobuf implementation is a valid peer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

SERVICE = "kvrelay.v1.KvTransfer"
FRAME_BYTES = 2 << 20
"""Payload that a sender aims at: measured to be the fastest."""
MAX_PAYLOAD_BYTES = 4 << 20
"""Largest payload that a sender puts into one frame, unless one layer of one block is larger."""

_FIXED64, _VARINT, _LEN, _FIXED32 = 1, 0, 2, 5
_TRANSFER_ID, _FIRST_BLOCK, _NUM_BLOCKS, _FIRST_LAYER, _NUM_LAYERS = range(1, 6)
_CHECKSUM, _PAYLOAD, _ACK_NOW, _ENCODING, _IS_LAST = range(6, 11)
_WIRE_TYPES = {
    _TRANSFER_ID: _FIXED64,
    _FIRST_BLOCK: _VARINT,
    _NUM_BLOCKS: _VARINT,
    _FIRST_LAYER: _VARINT,
    _NUM_LAYERS: _VARINT,
    _ACK_NOW: _VARINT,
    _ENCODING: _VARINT,
    _IS_LAST: _VARINT,
    _CHECKSUM: _FIXED64,
}
"""Of the header's fields, in the order of `FrameHeader`."""
_MAX_UINT32 = (1 << 32) - 1
_MAX_ENUM = (1 << 31) - 1
_CHECKED = struct.Struct("<8Q")
"""What the checksum covers beside the payload."""


class FrameError(ValueError):
    """The bytes are not a Frame."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """`kvrelay.v1.Frame` without its payload."""

    transfer_id: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
    ack_now: int = 0
    encoding: int = 0
    """Value of `Encoding`."""
    is_last: int = 0
    checksum: int = 0
    """As it was received; what is sent is computed."""

    @property
    def layers(self) -> tuple[int, int]:
        """The first one, and how many."""
        return self.first_layer, self.num_layers


def checksum(header: FrameHeader, parts: Sequence[memoryview | bytes]) -> int:
    """XXH3-64 of the header's fields and of the parts, one after the other (see kv_transfer.proto).

    Raises `ValueError` for a header that does not fit its fields.
    """
    try:
        fields = _CHECKED.pack(
            header.transfer_id,
            header.first_block,
            header.num_blocks,
            header.first_layer,
            header.num_layers,
            header.ack_now,
            header.encoding,
            header.is_last,
        )
    except struct.error as error:
        raise ValueError(f"a frame cannot have {header}: {error}") from error
    seed = xxhash.xxh3_64_intdigest(fields)
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0], seed)
    digest = xxhash.xxh3_64(seed=seed)
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def encode_frame(header: FrameHeader, parts: Sequence[memoryview | bytes]) -> bytes:
    """One Frame whose payload is the parts joined: the only copy on the sender's side.

    Raises `ValueError` for a header that does not fit its fields.
    """
    digest = checksum(header, parts)
    head = bytearray()
    _put_fixed64(head, _TRANSFER_ID, header.transfer_id)
    for field, value in (
        (_FIRST_BLOCK, header.first_block),
        (_NUM_BLOCKS, header.num_blocks),
        (_FIRST_LAYER, header.first_layer),
        (_NUM_LAYERS, header.num_layers),
        (_ACK_NOW, header.ack_now),
        (_ENCODING, header.encoding),
        (_IS_LAST, header.is_last),
    ):
        if value > _MAX_UINT32:
            raise ValueError(f"field {field} of a frame is {value}, not a uint32")
        if value:
            head.append(field << 3 | _VARINT)
            _put_varint(head, value)
    _put_fixed64(head, _CHECKSUM, digest)
    size = sum(len(part) for part in parts)
    if size:
        head.append(_PAYLOAD << 3 | _LEN)
        _put_varint(head, size)
    return b"".join((head, *parts))


def decode_frame(data: bytes) -> tuple[FrameHeader, memoryview]:
    """The header and a view of the payload inside `data`. Raises `FrameError`."""
    values = dict.fromkeys(_WIRE_TYPES, 0)
    view = memoryview(data)
    payload = view[:0]
    position = 0
    while position < len(data):
        tag, position = _get_varint(data, position)
        field, wire_type = tag >> 3, tag & 7
        if not 0 < field < 1 << 29:
            raise FrameError(f"field number {field} in a frame")
        value, start, position = _get_value(data, position, wire_type)
        if position > len(data):
            raise FrameError(f"a frame of {len(data)} bytes is cut short in field {field}")
        if field == _PAYLOAD and wire_type == _LEN:
            payload = view[start:position]
        elif _WIRE_TYPES.get(field) == wire_type:
            if wire_type == _VARINT and value > (_MAX_ENUM if field == _ENCODING else _MAX_UINT32):
                raise FrameError(f"field {field} of a frame is {value}, beyond 32 bits")
            values[field] = value
    return FrameHeader(*values.values()), payload


def _get_value(data: bytes, position: int, wire_type: int) -> tuple[int, int, int]:
    """One field's value (0 if it is bytes), where its bytes begin, and where it ends, be it beyond the data."""
    if wire_type == _VARINT:
        value, end = _get_varint(data, position)
        return value, position, end
    if wire_type == _FIXED64:
        return int.from_bytes(data[position : position + 8], "little"), position, position + 8
    if wire_type == _FIXED32:
        return 0, position, position + 4
    if wire_type == _LEN:
        size, start = _get_varint(data, position)
        return 0, start, start + size
    raise FrameError(f"wire type {wire_type} in a frame")


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _put_fixed64(out: bytearray, field: int, value: int) -> None:
    if value:
        out.append(field << 3 | _FIXED64)
        out += value.to_bytes(8, "little")


def _get_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise FrameError(f"a varint does not end in a frame of {len(data)} bytes")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7

"""How are KV blocks made smaller for a slow link, and whole again? Without loss, or as numbers of 8 bits.

Pure functions for any thread; nearly all of their work is done without the interpreter lock. An encoded payload
begins with a byte that says how it is coded: a frame that does not shrink, or that cannot be coded without harm,
goes as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from kvrelay.kv_transfer import byte_planes, fp8_blocks
from kvrelay.kv_transfer.part_shape import ITEM_BYTES, Buffer, EncodingError, PartShape
from kvrelay.v1.cluster_pb2 import KvLayout

_AS_IT_IS = 0


class Encoding(Enum):
    """The value is the first byte of a payload that is coded this way."""

    LOSSLESS = 1
    """Every bit comes back (byte_planes.py)."""
    FP8 = 2
    """Half of a bfloat16, a quarter of a float32, and not the same numbers (fp8_blocks.py)."""


def supports(encoding: Encoding, layout: KvLayout) -> bool:
    """Whether blocks of this layout can be encoded."""
    return layout.dtype in ITEM_BYTES and (encoding is not Encoding.FP8 or layout.head_elements % 2 == 0)


def encode(encoding: Encoding, shape: PartShape, parts: Sequence[Buffer]) -> list[Buffer]:
    """The payload of a frame, in pieces to be joined: parts of this shape, one for each block.

    At most a byte longer than the parts. The pieces may be the parts themselves, which must live until they are joined;
    otherwise no view of them is kept. With `FP8`, a frame with an element that is not finite goes as it is.
    Raises `ValueError` for parts of another size and shapes that `supports` denies.
    """
    shape.check(parts)
    if encoding is Encoding.FP8:
        _check_halves(shape)
        coded = fp8_blocks.encode(shape, parts) if parts else None
    else:
        coded = byte_planes.encode(shape, parts) if parts else None
    if coded is None:
        return [bytes([_AS_IT_IS]), *parts]
    return [bytes([encoding.value]), *coded]


def decode(encoding: Encoding, shape: PartShape, payload: Buffer, targets: Sequence[memoryview]) -> None:
    """Write the blocks of an encoded payload into the targets, one of this shape for each block.

    The payload need not be trusted: what does not come to exactly these blocks raises `EncodingError`, before a target
    is touched, and takes no more memory than they have. `payload` and targets are views of bytes. Raises `ValueError`
    for targets of another size.
    """
    shape.check(targets)
    if any(target.readonly for target in targets):
        raise ValueError("a block cannot be decoded into memory that is read-only")
    data = memoryview(payload).cast("B")
    if not data:
        raise EncodingError("an encoded payload is empty")
    kind, data = data[0], data[1:]
    if kind == _AS_IT_IS:
        _copy(shape, data, targets)
    elif kind != encoding.value:
        raise EncodingError(f"a payload is coded in the way {kind} where {encoding.value} ({encoding.name}) was agreed")
    elif encoding is Encoding.FP8:
        _check_halves(shape)
        fp8_blocks.decode(shape, data, targets)
    else:
        byte_planes.decode(shape, data, targets)


def _copy(shape: PartShape, data: memoryview, targets: Sequence[memoryview]) -> None:
    size = shape.num_bytes
    if len(data) != size * len(targets):
        raise EncodingError(f"a payload of {len(data)} bytes where {len(targets)} parts have {size * len(targets)}")
    for number, target in enumerate(targets):
        target[:] = data[number * size : (number + 1) * size]


def _check_halves(shape: PartShape) -> None:
    if shape.head_elements % 2:
        raise ValueError(f"K and V cannot be told apart in {shape.head_elements} elements")

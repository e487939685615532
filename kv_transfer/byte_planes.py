"""How do KV blocks become smaller without losing a bit? Bytes of one kind are put together and coded by frequency.

The highest byte of a floating-point number, sign and exponent, takes few values in a KV cache (3 of 8 bits in
bfloat16), the bytes of the mantissa are noise, and no sequence occurs twice. So the bytes of equal significance are
put side by side, in planes, and a plane that shrinks goes through zstd, set to do nothing but its Huffman coding: the
smallest table for matches, and only long ones looked for. For bfloat16 that is two and a half times as fast as level 1,
and smaller (docs/benchmarks.md); the negative levels leave out the Huffman coding, lz4 has none.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from kvrelay.kv_transfer.part_shape import Buffer, EncodingError, PartShape, flat

Plane = npt.NDArray[np.uint8]
Items = npt.NDArray[Any]

PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    window_log=17,
    target_length=0,
    write_checksum=False,
    write_content_size=True,
)
_MAX_WINDOW_BYTES = 1 << 20
"""A frame that asks for more than this beside its output is refused."""
_PIECE_ITEMS = 1 << 17
"""Split or joined at once, so that what lies between two passes stays in the cache."""
_PROBE_BYTES = 4 << 10
_WORTH_IT = 0.95
"""A plane stays as it is when a sample of it does not shrink to this."""


class _Coders(threading.local):
    """zstandard's contexts are not for two threads at a time, and too large to be made for each frame."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)


_coders = _Coders()


def encode(shape: PartShape, parts: Sequence[Buffer]) -> list[Buffer] | None:
    """For each plane, the lowest bytes first, its size (uint32, little-endian), then the planes.

    A plane is a zstd frame, or as it is: then its size is one byte for each element. None when no plane shrinks. The
    sizes of the parts are the caller's to check.
    """
    planes = _split(shape, parts)
    coded = [_shrink(plane) for plane in planes]
    sizes = [len(plane) for plane in coded]
    if sum(sizes) == planes.size:
        return None
    return [_sizes(shape).pack(*sizes), *coded]


def decode(shape: PartShape, data: memoryview, targets: Sequence[memoryview]) -> None:
    """Fill the targets. Raises `EncodingError` before anything is written."""
    sizes_format = _sizes(shape)
    if len(data) < sizes_format.size:
        raise EncodingError(f"{len(data)} bytes are not even the sizes of {shape.item_bytes} planes")
    sizes = sizes_format.unpack_from(data)
    if sum(sizes) != len(data) - sizes_format.size:
        raise EncodingError(f"planes of {sizes} bytes in {len(data) - sizes_format.size}")
    num_items = shape.num_elements * len(targets)
    planes = []
    start = sizes_format.size
    for size in sizes:
        planes.append(_grow(data[start : start + size], num_items))
        start += size
    for number, target in enumerate(targets):
        first = number * shape.num_elements
        _join([plane[first : first + shape.num_elements] for plane in planes], np.frombuffer(target, shape.bits))


def _sizes(shape: PartShape) -> struct.Struct:
    return struct.Struct(f"<{shape.item_bytes}I")


def _split(shape: PartShape, parts: Sequence[Buffer]) -> Plane:
    """`[plane, element]`, the lowest bytes first."""
    planes = np.empty((shape.item_bytes, shape.num_elements * len(parts)), np.uint8)
    # Shifting and cutting off is four times as fast as copying every second byte.
    shifted = np.empty(_PIECE_ITEMS, shape.bits)
    start = 0
    for part in parts:
        for piece in _pieces(np.frombuffer(part, shape.bits)):
            end = start + len(piece)
            np.copyto(planes[0, start:end], piece, casting="unsafe")
            for number in range(1, shape.item_bytes):
                np.right_shift(piece, 8 * number, out=shifted[: len(piece)])
                np.copyto(planes[number, start:end], shifted[: len(piece)], casting="unsafe")
            start = end
    return planes


def _join(planes: Sequence[Plane], items: Items) -> None:
    """Fill the elements from a piece of each plane."""
    start = 0
    for piece in _pieces(items):
        end = start + len(piece)
        highest = planes[-1][start:end]
        np.left_shift(highest, 8, out=piece, dtype=piece.dtype)
        np.bitwise_or(piece, planes[-2][start:end], out=piece)
        for plane in planes[-3::-1]:
            np.left_shift(piece, 8, out=piece)
            np.bitwise_or(piece, plane[start:end], out=piece)
        start = end


def _pieces(items: Items) -> Iterator[Items]:
    for start in range(0, len(items), _PIECE_ITEMS):
        yield items[start : start + _PIECE_ITEMS]


def _shrink(plane: Plane) -> Buffer:
    """A zstd frame, or the plane where that is not smaller."""
    compress = _coders.compressor.compress
    if len(plane) > 8 * _PROBE_BYTES:
        middle = len(plane) // 2
        sample = np.concatenate((plane[:_PROBE_BYTES], plane[middle : middle + _PROBE_BYTES], plane[-_PROBE_BYTES:]))
        if len(compress(flat(sample))) > _WORTH_IT * len(sample):
            return flat(plane)
    coded = compress(flat(plane))
    return coded if len(coded) < len(plane) else flat(plane)


def _grow(coded: memoryview, num_items: int) -> Plane:
    """The plane of so many elements. Nothing is allocated for a frame that declares another size."""
    if len(coded) == num_items:
        return np.frombuffer(coded, np.uint8)
    try:
        declared = zstandard.get_frame_parameters(coded).content_size
        if declared != num_items:
            raise EncodingError(f"a plane declares {declared} bytes where the frame has {num_items} elements")
        plane = np.empty(num_items, np.uint8)
        with _coders.decompressor.stream_reader(coded) as reader:
            size = reader.readinto(flat(plane))
    except zstandard.ZstdError as error:
        raise EncodingError(f"a plane of {len(coded)} bytes is not a zstd frame: {error}") from error
    if size != num_items:
        raise EncodingError(f"a plane ends after {size} of {num_items} bytes")
    return plane

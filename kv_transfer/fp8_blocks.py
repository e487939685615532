"""How do KV blocks become half as large, at the price of accuracy? As e4m3, 8 bits each, with a scale for each head.

e4m3 has 4 bits of exponent, 3 of mantissa, no infinity, and 448 as its largest number
(Micikevicius et al., "FP8 Formats for Deep Learning", section 3; torch's `float8_e4m3fn`). Each block has one scale for
every layer, head and half of K||V: the largest magnitude there is 448 times the scale. An element is off by a sixteenth
of itself at most, or by a 1,024th of the scale if it is very small, and by the rounding of its own type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.kv_transfer.part_shape import Buffer, EncodingError, PartShape, flat

LARGEST = 448.0
"""Of e4m3."""

_Bits = npt.NDArray[Any]
_Floats = npt.NDArray[np.float32]

_PIECE_ELEMENTS = 1 << 18
"""Converted at once: the arrays between two passes stay in the cache, and the interpreter lock is rarely asked for."""
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
"""Bits without a sign; what is not finite is this or more."""
_LARGEST_SCALE = {
    dtype: np.nextafter(np.float32(largest / LARGEST), np.float32(0))
    for dtype, largest in (
        ("bfloat16", float(np.uint32(0x7F7F0000).view(np.float32))),
        ("float16", float(np.finfo(np.float16).max)),
        ("float32", float(np.finfo(np.float32).max)),
    )
}
"""448 times a larger one is infinite in this type."""
_SMALLEST_SCALE = np.finfo(np.float32).tiny
"""One over a smaller one is infinite."""


def _values() -> _Floats:
    """What the 256 codes stand for."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    positive = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), mantissa * 2.0**-9)
    positive[-1] = np.nan
    values: _Floats = np.concatenate((positive, -positive)).astype(np.float32)
    return values


def _codes() -> npt.NDArray[np.uint8]:
    """The nearest code, by the upper 16 bits of a float32; ties go away from zero, what is beyond 448 becomes 448.

    16 bits suffice: what lies half-way between two codes has five significant ones, so the bits that are cut off
    do not change on which side of it a number is.
    """
    bits = np.minimum(np.arange(1 << 15, dtype=np.uint32) << 16, _INFINITY["float32"])
    numbers = bits.view(np.float32)
    values = _VALUES[:127].astype(np.float64)
    positive = np.searchsorted((values[1:] + values[:-1]) / 2, numbers, side="right").astype(np.uint8)
    return np.concatenate((positive, positive | 0x80))


_VALUES = _values()
_CODES = _codes()


def encode(shape: PartShape, parts: Sequence[Buffer]) -> list[Buffer] | None:
    """Scales (float32, native) `[part, layer, kv_head, half]`, then codes in the order of the elements.

    None when an element is infinite or not a number: e4m3 has no infinity, and a scale would spread what a single
    element has to all. The sizes of the parts are the caller's to check.
    """
    scales = np.empty((len(parts), shape.num_rows, 2), np.float32)
    codes = np.empty((len(parts), shape.num_elements), np.uint8)
    numbers = np.empty(_piece_rows(shape) * shape.row_elements, np.float32)
    indices = np.empty(numbers.size, np.intp)
    for part, its_scales, its_codes in zip(parts, scales, codes, strict=True):
        rows = np.frombuffer(part, shape.bits).reshape(-1, shape.block_size_tokens, shape.head_elements)
        for piece in _pieces(shape):
            if not _find_scales(shape, rows[piece], its_scales[piece]):
                return None
            size = rows[piece].size
            scaled = numbers[:size].reshape(rows[piece].shape)
            _to_float32(shape, rows[piece], scaled)
            np.multiply(scaled, _per_element(shape, np.reciprocal(its_scales[piece])), out=scaled)
            np.right_shift(numbers[:size].view(np.uint32), 16, out=indices[:size])
            first = piece.start * shape.row_elements
            np.take(_CODES, indices[:size], out=its_codes[first : first + size], mode="clip")
    return [flat(scales), flat(codes)]


def decode(shape: PartShape, data: memoryview, targets: Sequence[memoryview]) -> None:
    """Fill the targets. Raises `EncodingError` before anything is written."""
    num_scales = len(targets) * shape.num_rows * 2
    expected = num_scales * 4 + len(targets) * shape.num_elements
    if len(data) != expected:
        raise EncodingError(f"{len(data)} bytes where scales and codes of {len(targets)} parts have {expected}")
    # A copy: inside a frame they may lie at any address.
    scales = np.frombuffer(data[: num_scales * 4], np.float32).reshape(len(targets), shape.num_rows, 2).copy()
    if not np.all((scales >= _SMALLEST_SCALE) & (scales <= _LARGEST_SCALE[shape.dtype])):
        raise EncodingError(f"a scale is not between {_SMALLEST_SCALE} and {_LARGEST_SCALE[shape.dtype]}")
    codes = np.frombuffer(data[num_scales * 4 :], np.uint8)
    codes = codes.reshape(len(targets), shape.num_rows, shape.block_size_tokens, 2, shape.head_elements // 2)
    indices = np.empty(_piece_rows(shape) * shape.row_elements, np.intp)
    for target, its_scales, its_codes in zip(targets, scales, codes, strict=True):
        rows = np.frombuffer(target, shape.bits).reshape(its_codes.shape)
        for piece in _pieces(shape):
            # One table for all groups: the codes of the second are those of the first plus 256, and so on.
            table = _table(shape, its_scales[piece])
            first_entry = np.arange(0, table.size, 256).reshape(-1, 1, 2, 1)
            index = indices[: its_codes[piece].size].reshape(its_codes[piece].shape)
            np.add(its_codes[piece], first_entry, out=index)
            np.take(table, index, out=rows[piece], mode="clip")


def _piece_rows(shape: PartShape) -> int:
    return min(shape.num_rows, max(1, _PIECE_ELEMENTS // shape.row_elements))


def _pieces(shape: PartShape) -> Iterator[slice]:
    """Of the rows of one part."""
    size = _piece_rows(shape)
    return (slice(start, min(start + size, shape.num_rows)) for start in range(0, shape.num_rows, size))


def _find_scales(shape: PartShape, rows: _Bits, scales: _Floats) -> bool:
    """Into `[row, half]`; returns whether every element is finite."""
    # Without its sign a floating-point number is ordered like the integer with its bits.
    infinity = _INFINITY[shape.dtype]
    magnitude = (1 << (8 * shape.item_bytes - 1)) - 1
    largest = np.bitwise_and(rows, magnitude).max(axis=1).reshape(len(rows), 2, -1).max(axis=2)
    if largest.max() >= infinity:
        return False
    _to_float32(shape, largest, scales)
    np.divide(scales, np.float32(LARGEST), out=scales)
    np.clip(scales, _SMALLEST_SCALE, _LARGEST_SCALE[shape.dtype], out=scales)
    return True


def _to_float32(shape: PartShape, items: _Bits, numbers: _Floats) -> None:
    if shape.dtype == "bfloat16":
        np.left_shift(items, 16, out=numbers.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(numbers, items.view(shape.dtype))


def _per_element(shape: PartShape, of_halves: _Floats) -> _Floats:
    """`[row, half]` -> `[row, 1, element]`: one long inner loop is faster than two."""
    return np.repeat(of_halves, shape.head_elements // 2, axis=1)[:, np.newaxis]


def _table(shape: PartShape, scales: _Floats) -> npt.NDArray[Any]:
    """For each `[row, half]` the bits of what its 256 codes stand for, rounded to nearest, ties to even."""
    numbers = scales.reshape(-1, 1) * _VALUES
    if shape.dtype != "bfloat16":
        return numbers.astype(shape.dtype).view(shape.bits).reshape(-1)
    # The codes that are not a number have a mantissa that rounding does not carry over.
    bits = numbers.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16).reshape(-1)

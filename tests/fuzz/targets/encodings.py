"""An encoded payload decodes to exactly its blocks, or is refused before one of them is touched."""

from __future__ import annotations

from collections.abc import Iterator

from kvrelay.kv_transfer.encoding import Encoding, decode, encode
from kvrelay.kv_transfer.part_shape import EncodingError, PartShape
from tests.fuzz.target import Target, plain

_SHAPES = [
    PartShape(num_layers=2, num_kv_heads=2, block_size_tokens=4, head_elements=8, dtype=dtype)
    for dtype in ("bfloat16", "float16", "float32")
]
_UNTOUCHED = 0xA5


def _check(data: bytes) -> None:
    """The first byte chooses the encoding, the shape and how many blocks there are."""
    if not data:
        return
    choice, payload = data[0], data[1:]
    encoding = list(Encoding)[choice % 2]
    shape = _SHAPES[choice // 2 % 3]
    targets = [bytearray([_UNTOUCHED]) * shape.num_bytes for _ in range(1 + choice // 6 % 3)]
    try:
        decode(encoding, shape, payload, [memoryview(target) for target in targets])
    except EncodingError:
        assert all(set(target) == {_UNTOUCHED} for target in targets), "refused, and written"


def _seeds() -> Iterator[bytes]:
    for choice in range(18):
        shape = _SHAPES[choice // 2 % 3]
        parts = [bytes(range(shape.item_bytes)) * shape.num_elements for _ in range(1 + choice // 6 % 3)]
        coded = b"".join(encode(list(Encoding)[choice % 2], shape, parts))
        yield bytes([choice]) + coded
        yield bytes([choice, 0]) + b"".join(parts)


TARGET = Target("encodings", "the payload of an encoded Frame", lambda: plain(_check), _seeds)

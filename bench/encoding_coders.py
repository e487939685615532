"""What else could make the highest bytes of KV elements smaller? zstd's levels, zlib and, if it is installed, lz4."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import zstandard

from kvrelay.kv_transfer import byte_planes

LEVELS = (-5, -1, 1, 3)


@dataclass(frozen=True, slots=True)
class Coder:
    """Bytes -> fewer bytes -> so many bytes."""

    name: str
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes, int], bytes]


def all_coders() -> Iterator[Coder]:
    """Ours first."""
    yield Coder(
        "zstd, Huffman only (ours)",
        zstandard.ZstdCompressor(compression_params=byte_planes.PARAMETERS).compress,
        _zstd_decode,
    )
    for level in LEVELS:
        yield Coder(f"zstd {level}", zstandard.ZstdCompressor(level=level).compress, _zstd_decode)
    yield Coder("zlib, Huffman only", _zlib_encode, lambda data, size: zlib.decompress(data, -zlib.MAX_WBITS, size))
    yield Coder("zlib 1", partial(zlib.compress, level=1), lambda data, size: zlib.decompress(data, bufsize=size))
    if find_spec("lz4") is not None:
        import lz4.block

        yield Coder(
            "lz4",
            partial(lz4.block.compress, store_size=False),
            lambda data, size: lz4.block.decompress(data, uncompressed_size=size),
        )


def _zstd_decode(data: bytes, size: int) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)


def _zlib_encode(data: bytes) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()

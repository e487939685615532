"""Frames are encoded when the operator says so, or when the link is slower than the coding."""

from __future__ import annotations

import numpy as np
import pytest

from kvrelay.kv_transfer import link_coder
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.encoding import Encoding
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.link_coder import LinkCoder, accepted
from kvrelay.kv_transfer.part_shape import EncodingError
from kvrelay.kv_transfer.wire import FrameHeader
from kvrelay.v1.cluster_pb2 import KvLayout

LAYOUT = KvLayout(dtype="bfloat16", num_layers=2, num_kv_heads=1, head_elements=64, block_size_tokens=16)
BLOCK = 2 * 64 * 16 * 2
ALL = (Encoding.LOSSLESS.value, Encoding.FP8.value)


def block() -> memoryview:
    """Numbers around 1, whose high bytes shrink."""
    values = np.random.default_rng(0).normal(1, 0.1, BLOCK // 2).astype(np.float32)
    return memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def is_encoded(coder: LinkCoder) -> bool:
    return coder.encode(ALL, 2, [block()])[0] != 0


def test_without_compression_the_views_themselves_go() -> None:
    views = [block()]
    assert LinkCoder(Compression.NONE, LAYOUT, 2).encode(ALL, 2, views) == (0, views)


@pytest.mark.parametrize("compression", [Compression.LOSSLESS, Compression.FP8])
def test_what_is_encoded_comes_back(compression: Compression) -> None:
    encoding, pieces = LinkCoder(compression, LAYOUT, 2).encode(ALL, 2, [block(), block()])
    payload = b"".join(pieces)
    assert len(payload) < 2 * BLOCK
    decoder = FrameDecoder(LAYOUT, accepted(compression, LAYOUT))
    header = FrameHeader(1, 0, 2, 0, 2, encoding=encoding)
    blocks = decoder.decode(header, memoryview(payload))
    assert len(blocks) == 2 * BLOCK
    if compression is Compression.LOSSLESS:
        assert bytes(blocks) == bytes(block()) * 2


def test_a_receiver_that_does_not_take_it_gets_what_it_takes() -> None:
    assert LinkCoder(Compression.FP8, LAYOUT, 2).encode([Encoding.LOSSLESS.value], 2, [block()])[0] == 0


def test_loss_is_taken_only_where_it_is_asked_for() -> None:
    assert accepted(Compression.NONE, LAYOUT) == [Encoding.LOSSLESS]
    assert accepted(Compression.FP8, LAYOUT) == [Encoding.LOSSLESS, Encoding.FP8]
    assert accepted(Compression.FP8, KvLayout(dtype="int8")) == []


@pytest.mark.parametrize("encoding", [Encoding.FP8.value, 77])
def test_what_was_not_agreed_is_not_decoded(encoding: int) -> None:
    header = FrameHeader(1, 0, 1, 0, 2, encoding=encoding)
    with pytest.raises(EncodingError, match="agreed"):
        FrameDecoder(LAYOUT, [Encoding.LOSSLESS]).decode(header, memoryview(bytes(10)))


def test_auto_begins_without_and_encodes_on_a_slow_link() -> None:
    coder = LinkCoder(Compression.AUTO, LAYOUT, 2)
    assert not is_encoded(coder), "the link is unknown"
    for _ in range(16):
        coder.sent(1 << 20, 10.0)
    assert is_encoded(coder), "to measure the coding"
    assert is_encoded(coder)


def test_auto_leaves_a_fast_link_alone_but_for_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_coder, "_PROBE_BYTES", 10 * BLOCK)
    coder = LinkCoder(Compression.AUTO, LAYOUT, 2)
    for _ in range(16):
        coder.sent(1 << 20, 1e-9)
    encoded = [is_encoded(coder) for _ in range(41)]
    assert encoded[0], "to measure the coding"
    assert sum(encoded[1:]) == 4

"""Are the frames to one peer encoded? As the operator says, or where the link is slower than the coding."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence

from kvrelay.block_hash import layout_fingerprint
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.encoding import Encoding, encode, supports
from kvrelay.kv_transfer.encoding_choice import EncodingMeter
from kvrelay.kv_transfer.part_shape import Buffer, PartShape
from kvrelay.v1.cluster_pb2 import KvLayout

_PROBE_BYTES = 256 << 20
"""One frame in so many bytes is encoded although it does not seem to pay, or is not although it does: links change."""
_LINK_BYTES = 16 << 20
"""Sent before the link is believed to be known."""


_ENCODINGS = {
    Compression.NONE: None,
    Compression.AUTO: Encoding.LOSSLESS,
    Compression.LOSSLESS: Encoding.LOSSLESS,
    Compression.FP8: Encoding.FP8,
}


def accepted(compression: Compression, layout: KvLayout) -> list[Encoding]:
    """What a receiver takes: everything without loss, and what loses something only if it is told to."""
    encodings = [Encoding.LOSSLESS, Encoding.FP8] if compression is Compression.FP8 else [Encoding.LOSSLESS]
    return [encoding for encoding in encodings if supports(encoding, layout)]


def named_layout(compression: Compression, layout: KvLayout) -> KvLayout:
    """The layout of a worker's blocks: those that went through fp8 must not pass for exact ones anywhere."""
    if Encoding.FP8 not in accepted(compression, layout):
        return layout
    named = KvLayout()
    named.CopyFrom(layout)
    named.format += "+fp8"
    named.fingerprint = layout_fingerprint(named)
    return named


class LinkCoder:
    """Encodes frames for one peer, and measures what that and the link take. Any thread."""

    def __init__(self, compression: Compression, layout: KvLayout, num_streams: int) -> None:
        self._encoding = _ENCODINGS[compression]
        self._is_auto = compression is Compression.AUTO
        self._layout = layout
        self._num_streams = num_streams
        self._lock = threading.Lock()
        self._coding = EncodingMeter()
        self._link = EncodingMeter()
        self._link_bytes = 0
        self._unprobed_bytes = 0

    def encode(
        self, accepted: Collection[int], num_layers: int, views: Sequence[memoryview]
    ) -> tuple[int, Sequence[Buffer]]:
        """The encoding of a frame of these blocks, and its payload in pieces, which may be the views themselves.

        `accepted`: values of the encodings that the receiver takes.
        """
        num_bytes = sum(map(len, views))
        encoding = self._encoding
        if encoding is None or encoding.value not in accepted or not self._pays(num_bytes):
            return 0, views
        began = time.perf_counter()
        pieces = encode(encoding, PartShape.of(self._layout, num_layers), views)
        self._coding.add(num_bytes, sum(map(len, pieces)), time.perf_counter() - began)
        return encoding.value, pieces

    def sent(self, num_bytes: int, seconds: float) -> None:
        """A stream was busy for so long with a message."""
        if self._is_auto:
            self._link.add(num_bytes, num_bytes, seconds)
            with self._lock:
                self._link_bytes += num_bytes

    def _pays(self, num_bytes: int) -> bool:
        if not self._is_auto:
            return True
        with self._lock:
            if self._link_bytes < _LINK_BYTES:
                return False
            self._unprobed_bytes += num_bytes
            is_probe = self._unprobed_bytes >= _PROBE_BYTES
            if is_probe:
                self._unprobed_bytes = 0
        speed = self._link.bytes_per_s
        pays = speed is not None and self._coding.worthwhile(speed * self._num_streams, num_threads=self._num_streams)
        return pays is None or pays != is_probe

"""Does it pay to encode what is sent to this peer? Only where the link is slower than the coding."""

from __future__ import annotations

import math
import threading

_HALF_LIFE_BYTES = 64 << 20
_MARGIN = 0.1
"""What is measured varies, and being wrong costs processor time besides."""


def fastest_link(
    *, ratio: float, encode_bytes_per_s: float, decode_bytes_per_s: float = math.inf, margin: float = _MARGIN
) -> float:
    """The bandwidth (bytes/s) below which sending encoded is faster than sending as it is, by `margin` at least.

    `ratio`: encoded by raw bytes. Speeds are in raw bytes and those of all threads that work for the link together.
    Encoding, sending and decoding overlap, so a byte takes as long as the slowest of them: max(1 / encode,
    ratio / bandwidth, 1 / decode), against 1 / bandwidth. 0 when the bytes do not shrink enough for any link.
    """
    if ratio * (1 + margin) >= 1:
        return 0.0
    return min(encode_bytes_per_s, decode_bytes_per_s) / (1 + margin)


def worthwhile(
    bandwidth_bytes_per_s: float,
    *,
    ratio: float,
    encode_bytes_per_s: float,
    decode_bytes_per_s: float = math.inf,
    margin: float = _MARGIN,
) -> bool:
    """Whether to send encoded over a link of this bandwidth; see `fastest_link`."""
    return bandwidth_bytes_per_s < fastest_link(
        ratio=ratio, encode_bytes_per_s=encode_bytes_per_s, decode_bytes_per_s=decode_bytes_per_s, margin=margin
    )


class EncodingMeter:
    """How fast one encoding was lately, and how small; averages in which a measurement fades as more bytes follow.

    Any thread may add and read.
    """

    def __init__(self, half_life_bytes: float = _HALF_LIFE_BYTES) -> None:
        """`half_life_bytes`: after so many raw bytes a measurement counts for half."""
        self._half_life_bytes = half_life_bytes
        self._lock = threading.Lock()
        self._raw_bytes = self._encoded_bytes = self._seconds = 0.0

    def add(self, raw_bytes: int, encoded_bytes: int, seconds: float) -> None:
        """One thread has encoded (or decoded) a frame."""
        kept = 0.5 ** (raw_bytes / self._half_life_bytes)
        with self._lock:
            self._raw_bytes = self._raw_bytes * kept + raw_bytes
            self._encoded_bytes = self._encoded_bytes * kept + encoded_bytes
            self._seconds = self._seconds * kept + seconds

    @property
    def bytes_per_s(self) -> float | None:
        """Raw bytes, of one thread; None as long as nothing was measured."""
        with self._lock:
            return self._raw_bytes / self._seconds if self._seconds else None

    @property
    def ratio(self) -> float | None:
        """Encoded by raw bytes; None as long as nothing was measured."""
        with self._lock:
            return self._encoded_bytes / self._raw_bytes if self._raw_bytes else None

    def worthwhile(self, bandwidth_bytes_per_s: float, *, num_threads: int = 1) -> bool | None:
        """See the function of this name; `num_threads` encode at a time. None as long as nothing was measured."""
        speed, ratio = self.bytes_per_s, self.ratio
        if speed is None or ratio is None:
            return None
        return worthwhile(bandwidth_bytes_per_s, ratio=ratio, encode_bytes_per_s=speed * num_threads)

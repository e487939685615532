"""What may happen to KV blocks on the network? The operator says so for a worker."""

from __future__ import annotations

import enum


class Compression(enum.Enum):
    """Of the frames that a worker sends; those of workers on the same machine are never compressed."""

    NONE = "none"
    AUTO = "auto"
    """Lossless, where the link is slower than that."""
    LOSSLESS = "lossless"
    FP8 = "fp8"
    """Lossy; the receiver must be told the same."""

"""How is a KV block named? By a chained hash of every token up to its end."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import sha256

from kvrelay.v1 import cluster_pb2

HASH_BYTES = 16
"""SHA-256 cut to 128 bits: collisions cannot be crafted, and nobody stumbles over one."""

_VERSION = b"kvrelay-block-hash-1"


def layout_fingerprint(layout: cluster_pb2.KvLayout) -> bytes:
    """Digest of everything that makes two workers' blocks interchangeable, the hash's version included."""
    fields = (
        layout.model,
        layout.dtype,
        layout.format,
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_elements,
        layout.block_size_tokens,
    )
    return sha256(_VERSION + repr(fields).encode()).digest()[:HASH_BYTES]


def chain_start(fingerprint: bytes, cache_salt: str) -> bytes:
    """What the first block's hash goes on from."""
    return sha256(fingerprint + cache_salt.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


def chain_hashes(previous: bytes, tokens: bytes, block_bytes: int) -> list[bytes]:
    """Hashes of the blocks that `tokens` (4 bytes each, as in memory) fill, going on from `previous`."""
    hashes = []
    for end in range(block_bytes, len(tokens) + 1, block_bytes):
        previous = _next_hash(previous, tokens[end - block_bytes : end])
        hashes.append(previous)
    return hashes


class BlockHasher:
    """Hashes of the full blocks of one token sequence that grows: `h[i] = H(h[i-1] || tokens[i])`.

    `h[-1]` covers the layout's fingerprint and the cache salt, so that neither another model's nor
    another tenant's blocks can be found (DESIGN, section 3).
    """

    def __init__(self, layout: cluster_pb2.KvLayout, cache_salt: str, token_ids: Iterable[int] = ()) -> None:
        self.block_size = layout.block_size_tokens
        self._last = chain_start(layout.fingerprint, cache_salt)
        self._open: list[int] = []
        self.hashes: list[bytes] = []
        self.num_tokens = 0
        self.append(token_ids)

    def partial_hash(self) -> bytes | None:
        """Name of the block that the last tokens do not fill; None when they end with a block."""
        return _next_hash(self._last, array("I", self._open).tobytes()) if self._open else None

    def all_hashes(self) -> list[bytes]:
        """Names of all blocks that hold the tokens so far, the last one full or not."""
        partial = self.partial_hash()
        return [*self.hashes] if partial is None else [*self.hashes, partial]

    def append(self, token_ids: Iterable[int]) -> None:
        """Add tokens; `hashes` grows by one for each block that they complete."""
        pending = self._open
        before = len(pending)
        pending.extend(token_ids)
        self.num_tokens += len(pending) - before
        full = len(pending) - len(pending) % self.block_size
        if full:
            tokens = array("I", pending[:full]).tobytes()
            new = chain_hashes(self._last, tokens, len(tokens) // full * self.block_size)
            self.hashes += new
            self._last = new[-1]
            del pending[:full]


def _next_hash(previous: bytes, tokens: bytes) -> bytes:
    return sha256(previous + tokens).digest()[:HASH_BYTES]

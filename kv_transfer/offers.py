"""Is what a peer offers or asks for something that this worker can take or give?"""

from __future__ import annotations

from kvrelay.v1 import cluster_pb2

HASH_BYTES = 16
MAX_OFFERED_BLOCKS = 1 << 16


class OfferError(ValueError):
    """An offer, or a request for one, that cannot be taken as it is; the message tells the peer why."""


class LayoutMismatchError(OfferError):
    """The two sides' KV caches differ."""


def check_layout(theirs: cluster_pb2.KvLayout, ours: cluster_pb2.KvLayout) -> None:
    """Raises `LayoutMismatchError` with both sides' values unless blocks of one side are blocks of the other."""
    if theirs.fingerprint != ours.fingerprint:
        raise LayoutMismatchError(
            f"the KV caches differ: sender [{describe_layout(theirs)}], receiver [{describe_layout(ours)}];"
            " start both workers with the same model, dtype, block size and --kv-compression"
        )


def split_hashes(block_hashes: bytes) -> list[bytes]:
    """The hashes of `block_hashes`, at least one. Raises `OfferError`."""
    size = len(block_hashes)
    if not size or size % HASH_BYTES or size // HASH_BYTES > MAX_OFFERED_BLOCKS:
        raise OfferError(f"block_hashes has {size} bytes; 16 for each of 1..{MAX_OFFERED_BLOCKS} blocks")
    return [block_hashes[i : i + HASH_BYTES] for i in range(0, size, HASH_BYTES)]


def describe_layout(layout: cluster_pb2.KvLayout) -> str:
    """One line with everything that must be equal."""
    return (
        f"model {layout.model}, {layout.dtype}, {layout.format}, {layout.num_layers} layers,"
        f" {layout.num_kv_heads} heads of {layout.head_elements}, {layout.block_size_tokens} tokens a block,"
        f" {layout.fingerprint.hex()}"
    )

"""Under which keys does the index know a prompt's blocks?"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from kvrelay.block_hash import HASH_BYTES, chain_hashes, chain_start
from kvrelay.coordinator.prefix_index.block_table import Keys

KEY_BYTES = 8
"""Of a block's hash, the first ones: two of a million blocks share a key with a probability of 1 : 40,000,000."""


def prefix_keys(hashes: Sequence[bytes]) -> Keys:
    """Of whole block hashes, in their order."""
    return np.frombuffer(b"".join(hashes), "<u8")[:: HASH_BYTES // KEY_BYTES]


def packed_keys(packed: bytes) -> Keys:
    """Of a `PrefixDelta`'s bytes; a part of a key at their end is left out."""
    return np.frombuffer(packed, "<u8", count=len(packed) // KEY_BYTES)


def prompt_keys(fingerprint: bytes, cache_salt: str, block_size_tokens: int, token_ids: Sequence[int]) -> Keys:
    """Of the blocks that a prompt fills; the same as those of `BlockHasher`'s hashes."""
    num_bytes = 4 * block_size_tokens
    tokens = array("I", token_ids).tobytes()
    return prefix_keys(chain_hashes(chain_start(fingerprint, cache_salt), tokens, num_bytes))

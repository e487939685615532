"""Keys of a prompt are those of its blocks' hashes."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.block_hash import BlockHasher
from kvrelay.coordinator.prefix_index.keys import packed_keys, prefix_keys, prompt_keys
from kvrelay.v1 import cluster_pb2

LAYOUT = cluster_pb2.KvLayout(fingerprint=b"f" * 16, block_size_tokens=4)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.text(max_size=5))
def test_of_a_prompt(tokens: list[int], salt: str) -> None:
    hashes = BlockHasher(LAYOUT, salt, tokens).hashes
    keys = prompt_keys(LAYOUT.fingerprint, salt, LAYOUT.block_size_tokens, tokens)
    assert keys.tolist() == prefix_keys(hashes).tolist()
    assert keys.tolist() == [int.from_bytes(block_hash[:8], "little") for block_hash in hashes]


def test_of_a_delta() -> None:
    assert sys.byteorder == "little"
    packed = b"".join(number.to_bytes(8, "little") for number in (1, 2**63))
    assert packed_keys(packed).tolist() == [1, 2**63]
    assert packed_keys(packed + b"rest").tolist() == [1, 2**63]
    assert packed_keys(b"").tolist() == []

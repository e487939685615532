"""A block's name depends on every token before its end, on the salt and on the layout, and on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.block_hash import HASH_BYTES, BlockHasher, layout_fingerprint
from kvrelay.v1 import cluster_pb2

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def layout(**changes: str | int) -> cluster_pb2.KvLayout:
    message = cluster_pb2.KvLayout(
        model="m", dtype="bfloat16", format="f", num_layers=2, num_kv_heads=3, head_elements=4, block_size_tokens=4
    )
    for name, value in changes.items():
        setattr(message, name, value)
    message.fingerprint = layout_fingerprint(message)
    return message


LAYOUT = layout()


def hashes(tokens: list[int], salt: str = "", layout: cluster_pb2.KvLayout = LAYOUT) -> list[bytes]:
    return BlockHasher(layout, salt, tokens).hashes


@given(st.lists(TOKENS, max_size=6))
def test_growing_in_pieces_gives_the_same_hashes(pieces: list[list[int]]) -> None:
    hasher = BlockHasher(LAYOUT, "salt")
    for piece in pieces:
        hasher.append(piece)
    tokens = [token for piece in pieces for token in piece]
    assert hasher.hashes == hashes(tokens, "salt")
    assert hasher.num_tokens == len(tokens)
    assert len(hasher.hashes) == len(tokens) // 4
    assert all(len(block_hash) == HASH_BYTES for block_hash in hasher.hashes)


@given(TOKENS, TOKENS)
def test_sequences_share_exactly_the_hashes_of_their_common_blocks(first: list[int], second: list[int]) -> None:
    common = 0
    while first[common * 4 : common * 4 + 4] == second[common * 4 : common * 4 + 4] and common < min(
        len(first) // 4, len(second) // 4
    ):
        common += 1
    a, b = hashes(first), hashes(second)
    assert a[:common] == b[:common]
    assert not set(a[common:]) & set(b[common:])


def test_the_same_tokens_elsewhere_have_another_name() -> None:
    assert len(set(hashes([1, 2, 3, 4] * 5))) == 5


def test_tenants_and_models_share_nothing() -> None:
    tokens = list(range(8))
    names = [hashes(tokens), hashes(tokens, "a"), hashes(tokens, "b"), hashes(tokens, layout=layout(model="n"))]
    assert len({name for part in names for name in part}) == 8


def test_a_salt_of_any_characters_will_do() -> None:
    assert hashes([1, 2, 3, 4], "\ud800") != hashes([1, 2, 3, 4], "\N{SNOWMAN}")


def test_every_field_of_the_layout_counts() -> None:
    fields = [f.name for f in cluster_pb2.KvLayout.DESCRIPTOR.fields if f.name != "fingerprint"]
    changed = [layout(**{name: "x" if isinstance(getattr(LAYOUT, name), str) else 99}) for name in fields]
    assert len({LAYOUT.fingerprint, *(other.fingerprint for other in changed)}) == len(fields) + 1


def test_fields_cannot_run_into_one_another() -> None:
    assert layout(model="a", dtype="bc").fingerprint != layout(model="ab", dtype="c").fingerprint


@given(TOKENS)
def test_the_last_block_has_a_name_before_it_is_full(tokens: list[int]) -> None:
    hasher = BlockHasher(LAYOUT, "", tokens)
    names = hasher.all_hashes()
    assert len(names) == -(-len(tokens) // 4)
    assert names[: len(hasher.hashes)] == hasher.hashes
    assert (hasher.partial_hash() is None) == (len(tokens) % 4 == 0)
    hasher.append([1, 2, 3, 4])
    assert len({*names, *hasher.all_hashes()}) == len(names) + len(hasher.all_hashes()) - len(tokens) // 4


def test_names_are_the_same_on_every_machine() -> None:
    """Blocks are shared between processes and versions: a change of these needs another `_VERSION`."""
    assert LAYOUT.fingerprint.hex() == "4b4e005e97af4e89efc7aebb50748d51"
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8], "tenant")[-1].hex() == "04a83f5e7a48c6c9bfe3cc1a79bee47b"

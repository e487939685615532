"""What a store holds of a prompt, whatever part of it that is, and never the prompt's last token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.block_hash import BlockHasher, layout_fingerprint
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.stored_prompt import StoredPrompt, look_up, name_blocks

BLOCK = 4
LAYOUT = cluster_pb2.KvLayout(block_size_tokens=BLOCK)
LAYOUT.fingerprint = layout_fingerprint(LAYOUT)


def store_with(*prompts: list[int]) -> BlockStore:
    """A store that got these prompts from a prefill worker, the last blocks as they were."""
    store = BlockStore(200)
    for prompt in prompts:
        for name in BlockHasher(LAYOUT, "", prompt).all_hashes():
            [slot] = store.reserve(1)
            store.unpin([store.commit(slot, name)])
    return store


def look(store: BlockStore, prompt: list[int]) -> StoredPrompt:
    hasher = BlockHasher(LAYOUT, "", prompt[:-1])
    stored = look_up(store, name_blocks(hasher, prompt[-1]))
    assert hasher.num_tokens == len(prompt)
    assert list(stored.hashes) == BlockHasher(LAYOUT, "", prompt).all_hashes()
    return stored


@pytest.mark.parametrize("num_tokens", range(1, 3 * BLOCK + 1))
def test_a_prefilled_prompt_is_loaded_but_for_its_last_token(num_tokens: int) -> None:
    prompt = list(range(num_tokens))
    stored = look(store_with(prompt), prompt)
    assert stored.load_tokens == num_tokens - 1
    assert len(stored.present) == len(stored.hashes)


@pytest.mark.parametrize("num_tokens", range(1, 3 * BLOCK + 1))
def test_with_the_first_token_after_it_all_of_the_prompt_is_loaded(num_tokens: int) -> None:
    prompt = list(range(num_tokens))
    stored = look(store_with(prompt), [*prompt, 99])
    assert stored.load_tokens == num_tokens
    assert len(stored.load) == -(-num_tokens // BLOCK)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=4),
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
)
def test_nothing_is_loaded_that_was_not_stored_for_these_tokens(stored: list[list[int]], prompt: list[int]) -> None:
    store = store_with(*stored)
    found = look(store, prompt)
    assert found.load_tokens <= len(prompt) - 1
    assert found.load_tokens <= len(found.load) * BLOCK
    assert list(found.load[: len(found.present)]) == list(found.present)
    # Somebody stored all the tokens that are loaded, as a prefix.
    assert not found.load_tokens or any(other[: found.load_tokens] == prompt[: found.load_tokens] for other in stored)
    # No stored prompt has more whole blocks in common than are loaded.
    for other in stored:
        common = 0
        while common < min(len(other), len(prompt)) and other[common] == prompt[common]:
            common += 1
        assert found.load_tokens >= min(common // BLOCK * BLOCK, len(prompt) - 1)


def test_an_empty_store_has_nothing() -> None:
    stored = look(BlockStore(4), list(range(10)))
    assert (list(stored.present), list(stored.load), stored.load_tokens) == ([], [], 0)

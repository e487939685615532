"""Prompts share what their block ids share, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.workload.prompts import prompt_token_ids
from kvrelay.workload.trace import TraceRequest

VOCAB = 50_000


def request(index: int, num_tokens: int, ids: Sequence[int] = (), block_tokens: int = 8) -> TraceRequest:
    return TraceRequest(
        index=index,
        arrived_s=0,
        num_prompt_tokens=num_tokens,
        num_output_tokens=1,
        block_ids=ids,
        block_tokens=block_tokens,
    )


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(first=ids, second=ids, short=st.integers(0, 7))
def test_prefixes_are_shared_as_recorded(first: list[int], second: list[int], short: int) -> None:
    shared = num_common(first, second)
    prompts = [prompt_token_ids(request(0, 8 * len(some) - short, some), VOCAB) for some in (first, second)]
    assert [len(prompt) for prompt in prompts] == [8 * len(some) - short for some in (first, second)]
    assert num_common(*prompts) == min(8 * shared, *map(len, prompts))


def test_requests_without_ids_share_nothing() -> None:
    assert num_common(prompt_token_ids(request(1, 50), VOCAB), prompt_token_ids(request(2, 50), VOCAB)) == 0
    assert prompt_token_ids(request(1, 50), VOCAB) == prompt_token_ids(request(1, 50), VOCAB)


def test_another_seed_is_another_text() -> None:
    first, second = (prompt_token_ids(request(0, 64, range(8)), VOCAB, seed=seed) for seed in (1, 2))
    assert first != second


def test_ids_stay_in_the_vocabulary() -> None:
    token_ids = prompt_token_ids(request(0, 4096, range(8), 512), 20, first_token_id=17)
    assert set(token_ids) == {17, 18, 19}


def test_a_vocabulary_without_ids() -> None:
    with pytest.raises(ValueError, match="first_token_id is 20"):
        prompt_token_ids(request(0, 1), 20, first_token_id=20)

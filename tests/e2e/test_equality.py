"""Prefill here and decode there give what one engine gives, token for token."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from kvrelay.client.results import Completion, Generation
from tests.support.equality_cases import Case, length_cases, option_cases
from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

BLOCK_TOKENS = 32


@pytest_asyncio.fixture
async def client(float32_cluster: LiveCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(float32_cluster.state.grpc_address) as client:
        yield client


async def ask(client: AsyncClient, case: Case, answer: dict[str, Any]) -> Generation:
    """Raw prompts go as token ids, conversations as messages."""
    prompt = answer["prompt_token_ids"] if isinstance(case.prompt, str) else case.prompt
    return await client.generate(prompt, **case.options, include_timeline=True)


def assert_same_logprobs(completion: Completion, rows: list[dict[str, list[float]]]) -> None:
    """The sampled token and the most likely ones, to a thousandth."""
    assert len(completion.logprobs) == len(rows)
    for got, row in zip(completion.logprobs, rows, strict=True):
        for entry in (got.sampled, *got.top):
            logprob, rank = row[str(entry.token_id)]
            assert math.isclose(entry.logprob, logprob, abs_tol=1e-3)
            assert entry.rank == rank


@pytest.mark.parametrize("case", [*length_cases(), *option_cases()], ids=lambda case: case.name)
async def test_the_cluster_answers_like_one_engine(client: AsyncClient, reference: dict[str, Any], case: Case) -> None:
    answer = reference[case.name]

    generation = await ask(client, case, answer)

    assert generation.usage is not None
    assert generation.usage.prompt_tokens == len(answer["prompt_token_ids"])
    for completion, expected in zip(generation.completions, answer["completions"], strict=True):
        assert list(completion.token_ids) == expected["token_ids"]
        assert completion.text == expected["text"]
        assert completion.finish_reason == expected["finish_reason"]
        if "logprobs" in case.options:
            assert_same_logprobs(completion, expected["logprobs"])


@pytest.mark.parametrize("num_tokens", [64, 100, 513])
async def test_the_decode_engine_loads_the_prompt_instead_of_computing_it(client: AsyncClient, num_tokens: int) -> None:
    prompt = [1000 + num_tokens + i for i in range(num_tokens)]

    generation = await client.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True, include_timeline=True)

    assert generation.timeline is not None
    counters = generation.timeline.counters
    assert counters["decode.blocks_loaded"] == math.ceil(num_tokens / BLOCK_TOKENS)
    assert counters["decode.tokens_stored"] == num_tokens
    assert counters["kv.received_bytes"] > 0


async def test_a_second_turn_finds_what_was_generated_in_the_first(client: AsyncClient) -> None:
    prompt = list(range(2000, 2100))
    first = await client.generate(prompt, max_tokens=40, temperature=0, ignore_eos=True)

    turn = [*prompt, *first.token_ids, *range(3000, 3010)]
    second = await client.generate(turn, max_tokens=2, temperature=0, ignore_eos=True, include_timeline=True)

    # Three blocks of 32 came with the first turn, and generating filled the fourth: only the rest is sent.
    assert second.timeline is not None
    block_bytes = 30 * 3 * 128 * BLOCK_TOKENS * 4
    assert second.timeline.counters["kv.received_bytes"] == (math.ceil(len(turn) / BLOCK_TOKENS) - 4) * block_bytes


async def test_prompt_logprobs_are_the_engine_s_also_when_the_prompt_is_stored(
    client: AsyncClient, reference: dict[str, Any]
) -> None:
    case = next(case for case in option_cases() if case.name == "prompt-logprobs")
    expected = reference[case.name]["prompt_logprobs"][1:]
    for _ in range(2):
        completion = (await ask(client, case, reference[case.name])).completions[0]
        assert len(completion.prompt_logprobs) == len(expected)
        for got, row in zip(completion.prompt_logprobs, expected, strict=True):
            assert math.isclose(got.sampled.logprob, row[str(got.sampled.token_id)][0], abs_tol=1e-3)

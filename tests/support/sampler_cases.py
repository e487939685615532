"""Requests whose next token depends on more than the tokens before: generators, penalties, grammars, n of one prompt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from kvrelay.client import AsyncClient
from kvrelay.client.options import GenerateOptions
from kvrelay.client.results import Collector, Generation

NUM_TOKENS = 48
_SEEDED: GenerateOptions = {"temperature": 1.0, "seed": 11}
_GREEDY: GenerateOptions = {"temperature": 0.0}
SAMPLER_CASES: Mapping[str, GenerateOptions] = {
    "greedy": _GREEDY,
    "seeded": _SEEDED,
    "seeded-top": {**_SEEDED, "top_p": 0.9, "top_k": 50, "n": 2},
    "penalties": {**_GREEDY, "presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    "bad-words": {**_GREEDY, "bad_words": [" the", " a", " of"]},
    "regex": {**_SEEDED, "regex": r"([a-z]{3,8} [0-9]{2}, ){30}", "presence_penalty": 0.5},
    "min-tokens": {**_GREEDY, "min_tokens": 30},
    "logprobs": {**_GREEDY, "logprobs": 2},
}
_PROMPT = "Tell me about the lighthouse on the coast, its keeper and the ships that passed in the storm. " * 6


async def one_by_one(client: AsyncClient) -> dict[str, Generation]:
    """The answers when each case has the engines for itself."""
    return {name: await _generate(client, name, 0, asyncio.Event()) for name in SAMPLER_CASES}


@contextlib.asynccontextmanager
async def all_at_once(client: AsyncClient, num_tokens: int) -> AsyncIterator[dict[str, asyncio.Task[Generation]]]:
    """A stream for each case; entered once all of them have got so many tokens, or have ended."""
    begun = {name: asyncio.Event() for name in SAMPLER_CASES}
    async with asyncio.TaskGroup() as tasks:
        streams = {
            name: tasks.create_task(_generate(client, name, num_tokens, begun[name]), name=name)
            for name in SAMPLER_CASES
        }
        for event in begun.values():
            await event.wait()
        yield streams


async def _generate(client: AsyncClient, name: str, num_tokens: int, begun: asyncio.Event) -> Generation:
    options = SAMPLER_CASES[name]
    collector = Collector()
    async for chunk in client.stream(_PROMPT, max_tokens=NUM_TOKENS, include_timeline=True, **options):
        collector.add(chunk)
        tokens = collector.token_ids.values()
        if len(tokens) == options.get("n", 1) and all(len(each) >= num_tokens for each in tokens):
            begun.set()
    begun.set()
    return collector.result()


def tokens_and_texts(answers: Mapping[str, Generation]) -> dict[str, list[tuple[Sequence[int], str]]]:
    """What has to be the same."""
    return {name: [(list(each.token_ids), each.text) for each in found.completions] for name, found in answers.items()}

"""Requests whose next token depends on more than the tokens before: generators, penalties, grammars."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from kvrelay.client import AsyncClient
from kvrelay.client.options import GenerateOptions
from kvrelay.client.results import Collector, Generation

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


async def one_by_one(client: AsyncClient, max_tokens: int) -> dict[str, Generation]:
    """The answers when each case has the engines for itself."""
    return {name: await _Stream(client, name, max_tokens).generate() for name in SAMPLER_CASES}


@contextlib.asynccontextmanager
async def all_at_once(
    client: AsyncClient, max_tokens: int, *, begun: int, num_begun: int = len(SAMPLER_CASES)
) -> AsyncIterator[dict[str, asyncio.Task[Generation]]]:
    """A stream for each case; entered once `num_begun` of them have got `begun` tokens, or have ended."""
    streams = {name: _Stream(client, name, max_tokens, begun) for name in SAMPLER_CASES}
    async with asyncio.TaskGroup() as tasks:
        running = {name: tasks.create_task(stream.generate(), name=name) for name, stream in streams.items()}
        waiting = asyncio.as_completed([stream.has_begun.wait() for stream in streams.values()])
        for _, next_begun in zip(range(num_begun), waiting, strict=False):
            await next_begun
        yield running


class _Stream:
    def __init__(self, client: AsyncClient, name: str, max_tokens: int, begun: int = 0) -> None:
        self.has_begun = asyncio.Event()
        self._client = client
        self._options = SAMPLER_CASES[name]
        self._max_tokens = max_tokens
        self._begun = begun

    async def generate(self) -> Generation:
        collector = Collector()
        stream = self._client.stream(_PROMPT, max_tokens=self._max_tokens, include_timeline=True, **self._options)
        async for chunk in stream:
            collector.add(chunk)
            tokens = collector.token_ids.values()
            if len(tokens) == self._options.get("n", 1) and all(len(each) >= self._begun for each in tokens):
                self.has_begun.set()
        self.has_begun.set()
        return collector.result()


def tokens_and_texts(answers: Mapping[str, Generation]) -> dict[str, list[tuple[Sequence[int], str]]]:
    """What has to be the same."""
    return {name: [(list(each.token_ids), each.text) for each in found.completions] for name, found in answers.items()}

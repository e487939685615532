"""What do steady streams feel while long prompts come in? The load and its measurement, by the client's clock."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.token_stream import Server, completion

_WARM_UP_S = 3.0
_MAX_TOKEN_ID = 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the servers."""

    seconds: float = 60.0
    """Measured, after a warm-up."""
    num_streams: int = 4
    stream_prompt_tokens: int = 64
    stream_max_tokens: int = 1000
    """A stream that has got so many asks again, with another prompt."""
    long_prompt_tokens: int = 1500
    long_max_tokens: int = 16
    long_every_s: float = 3.0


@dataclass(slots=True)
class Measured:
    """During the measured time."""

    itl_s: list[float] = field(default_factory=list)
    """Between two events of one request of a steady stream; what still lasts at the end, too."""
    ttft_s: list[float] = field(default_factory=list)
    """Of long prompts sent in that time; those that never began count until the end."""
    num_unanswered: int = 0
    """Of those prompts, without a token at the end."""
    num_stream_tokens: int = 0
    num_tokens: int = 0
    """Of everybody."""
    seconds: float = 0.0


class _Run:
    """One load on one set of servers, by turns."""

    def __init__(self, load: Load, servers: Sequence[Server]) -> None:
        self.measured = Measured()
        self._load = load
        self._servers = itertools.cycle(servers)
        self._numbers = random.Random(1)
        self._began_s = float("inf")
        self._last_s: dict[int, float] = {}
        self._waiting: dict[int, float] = {}
        self._flowing = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._stream(number)) for number in range(self._load.num_streams)]
            await self._flowing.wait()
            await asyncio.sleep(_WARM_UP_S)
            self._began_s = time.perf_counter()
            for number in range(int(self._load.seconds / self._load.long_every_s)):
                await self._until(self._began_s + number * self._load.long_every_s)
                running.append(tasks.create_task(self._long(number)))
            await self._until(self._began_s + self._load.seconds)
            self._end()
            for task in running:
                task.cancel()

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))

    def _end(self) -> None:
        now_s = time.perf_counter()
        self.measured.seconds = now_s - self._began_s
        self.measured.itl_s += [now_s - last_s for last_s in self._last_s.values()]
        self.measured.ttft_s += [now_s - sent_s for sent_s in self._waiting.values()]
        self.measured.num_unanswered = len(self._waiting)
        self._began_s = float("inf")

    async def _stream(self, number: int) -> None:
        """Ask again and again. The time to the first token of a request is nobody's gap."""
        server = next(self._servers)
        while True:
            self._last_s.pop(number, None)
            prompt = self._prompt(self._load.stream_prompt_tokens)
            async with contextlib.aclosing(completion(server, prompt, self._load.stream_max_tokens)) as arrivals:
                async for at_s, num_tokens in arrivals:
                    last_s = self._last_s.get(number)
                    self._last_s[number] = at_s
                    if len(self._last_s) == self._load.num_streams:
                        self._flowing.set()
                    if self._began_s < at_s:
                        self.measured.num_tokens += num_tokens
                        self.measured.num_stream_tokens += num_tokens
                        if last_s is not None:
                            self.measured.itl_s.append(at_s - last_s)

    async def _long(self, number: int) -> None:
        self._waiting[number] = sent_s = time.perf_counter()
        prompt = self._prompt(self._load.long_prompt_tokens)
        async with contextlib.aclosing(completion(next(self._servers), prompt, self._load.long_max_tokens)) as arrivals:
            async for at_s, num_tokens in arrivals:
                if self._waiting.pop(number, None) is not None:
                    self.measured.ttft_s.append(at_s - sent_s)
                self.measured.num_tokens += num_tokens

    def _prompt(self, num_tokens: int) -> list[int]:
        """Random, so that no cache knows it."""
        return [self._numbers.randrange(1000, _MAX_TOKEN_ID) for _ in range(num_tokens)]


async def apply(load: Load, servers: Sequence[Server]) -> Measured:
    """Every server answers a long prompt first; then the steady streams begin, and the clock after a while.

    Raises what `completion` raises; nothing is asked of the servers any more after that.
    """
    run = _Run(load, servers)
    for server in servers:
        prompt = [random.randrange(1000, _MAX_TOKEN_ID) for _ in range(load.long_prompt_tokens)]
        async for _ in completion(server, prompt, load.long_max_tokens):
            pass
    await run.run()
    return run.measured

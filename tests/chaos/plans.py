"""Which requests are sent, and when? All follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvrelay.engine.simulated_model import SimulatedConfig, expected_tokens
from tests.chaos.members import COORDINATORS
from tests.chaos.texts import expected_text

RATE_PER_S = 12.0
_NUM_PREFIXES = 12
_PREFIX_TOKENS = (100, 1200)
_TAIL_TOKENS = (1, 300)
_OUTPUT_TOKENS = (5, 150)
_TOKENS = (3, 40_000)
_SHARE_SHORT, _SHARE_SEVERAL, _SHARE_SEEDED, _SHARE_RANDOM = 0.2, 0.1, 0.2, 0.05

Way = Literal["grpc", "http", "events"]
"""The gRPC API, the HTTP API with one answer, or with server-sent events: that is text, and the others are tokens."""
_WAYS: Sequence[Way] = ("grpc", "http", "events")
_WAY_SHARES = (0.75, 0.1, 0.15)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """One request, before anything is sent."""

    index: int
    at_s: float
    """Since the load began."""
    coordinator: str
    way: Way
    prompt: Sequence[int]
    num_tokens: int
    n: int = 1
    seed: int | None = None
    temperature: float = 0.0
    known: Sequence[int] | None = None
    """What has to come, where the model is none that can be computed here."""

    @property
    def request_id(self) -> str:
        return f"chaos-{self.index}"

    def expected(self) -> list[int]:
        """The tokens of each completion, or the characters of its text where that is what comes."""
        if self.known is not None:
            return list(self.known)
        tokens = expected_tokens(self.prompt, self.num_tokens, SimulatedConfig(), self.seed)
        return list(map(ord, expected_text(self.prompt, tokens))) if self.way == "events" else tokens


def request_plans(seed: int, rate_per_s: float = RATE_PER_S) -> Iterator[RequestPlan]:
    """Without an end; arrivals are a Poisson process, prompts share prefixes."""
    rng = random.Random(f"{seed} load")
    prefixes = [_tokens(rng, rng.randint(*_PREFIX_TOKENS)) for _ in range(_NUM_PREFIXES)]
    at_s, index = 0.0, 0
    while True:
        at_s += rng.expovariate(rate_per_s)
        yield _plan(rng, prefixes, index, at_s)
        index += 1


def _plan(rng: random.Random, prefixes: Sequence[list[int]], index: int, at_s: float) -> RequestPlan:
    is_short = rng.random() < _SHARE_SHORT
    prefix = [] if is_short else rng.choice(prefixes)
    (way,) = rng.choices(_WAYS, _WAY_SHARES)
    several = way != "events" and rng.random() < _SHARE_SEVERAL
    sampling = rng.random()
    seeded = not several and sampling < _SHARE_SEEDED
    return RequestPlan(
        index=index,
        at_s=at_s,
        coordinator=rng.choice(COORDINATORS),
        way=way,
        prompt=[*prefix, *_tokens(rng, rng.randint(*_TAIL_TOKENS))],
        num_tokens=rng.randint(*_OUTPUT_TOKENS),
        n=2 if several else 1,
        seed=rng.randrange(1 << 31) if seeded else None,
        temperature=1.0 if several or sampling < _SHARE_RANDOM else 0.0,
    )


def _tokens(rng: random.Random, number: int) -> list[int]:
    return [rng.randrange(*_TOKENS) for _ in range(number)]

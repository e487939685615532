"""What has to come of a real model? What comes while nothing is broken."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tests.chaos.load import Load
from tests.chaos.members import COORDINATORS
from tests.chaos.plans import RequestPlan, request_plans

NUM_PLANS = 24
_FIRST_INDEX = 2_000_000
_MOST_PROMPT_TOKENS = 300
_MOST_TOKENS = 60


def small_plans(seed: int) -> list[RequestPlan]:
    """A few of the usual ones, for an engine that takes its time: each is asked for again and again."""
    return [fitted(plan) for plan in itertools.islice(request_plans(seed), NUM_PLANS)]


def fitted(plan: RequestPlan) -> RequestPlan:
    """Cut to size, and with one answer: random without a seed has many, and greedy decoding takes no `n`."""
    return replace(
        plan,
        prompt=plan.prompt[:_MOST_PROMPT_TOKENS],
        num_tokens=min(plan.num_tokens, _MOST_TOKENS),
        n=1,
        temperature=0.0 if plan.seed is None else 1.0,
    )


async def learn(load: Load, plans: Sequence[RequestPlan]) -> list[RequestPlan]:
    """The same plans, knowing what has to come. Raises what a request raises."""
    learned = []
    for number, plan in enumerate(plans):
        answer = load.start(replace(plan, index=_FIRST_INDEX + number))
        await load.wait_ended()
        if answer.error is not None:
            raise answer.error
        (known,) = answer.tokens
        assert known
        learned.append(replace(plan, known=tuple(known)))
    load.answers.clear()
    return learned


def again_and_again(plans: Sequence[RequestPlan], seed: int, rate_per_s: float) -> Iterator[RequestPlan]:
    """Without an end, in a random order, as a Poisson process."""
    rng = random.Random(f"{seed} again")
    at_s = 0.0
    for index in itertools.count():
        at_s += rng.expovariate(rate_per_s)
        yield replace(rng.choice(plans), index=index, at_s=at_s, coordinator=rng.choice(COORDINATORS))

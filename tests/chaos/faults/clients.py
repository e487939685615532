"""Clients that change their mind, read slowly, or vanish."""

from __future__ import annotations

import asyncio
import dataclasses
import random

from kvrelay.client import AsyncClient
from tests.chaos.faults.base import Fault, Lab
from tests.chaos.links import open_link
from tests.chaos.members import COORDINATORS
from tests.chaos.plans import RequestPlan, request_plans

_FIRST_INDEX = 1_000_000


def _extra_plan(rng: random.Random, coordinator: str, num_tokens: int) -> RequestPlan:
    """A request beside the load, over gRPC, with a number that no other has."""
    plan = next(request_plans(rng.randrange(1 << 31)))
    index = _FIRST_INDEX + rng.randrange(1 << 40)
    return dataclasses.replace(plan, index=index, coordinator=coordinator, num_tokens=num_tokens, way="grpc")


class CancelBurst(Fault):
    """Half of the requests of this moment are cancelled at once."""

    name, target = "cancel-burst", "clients"

    def __init__(self, rng: random.Random) -> None:
        self._rng = random.Random(rng.random())

    async def inject(self, lab: Lab) -> None:
        for answer in lab.load.open_answers:
            if self._rng.random() < 0.5:
                lab.load.cancel(answer)


class SlowReader(Fault):
    """A client waits after every chunk."""

    name = "slow-reader"

    def __init__(self, rng: random.Random) -> None:
        self.target = rng.choice(COORDINATORS)
        self.plans = [_extra_plan(rng, self.target, num_tokens=100)]

    async def inject(self, lab: Lab) -> None:
        answer = lab.load.start(self.plans[0], pause_s=0.1)
        while answer.is_open:
            await asyncio.sleep(0.1)


class Vanish(Fault):
    """A client's connection breaks in the middle of three streams, and nobody comes back."""

    name = "vanish"

    def __init__(self, rng: random.Random) -> None:
        self.target = rng.choice(COORDINATORS)
        self.plans = [_extra_plan(rng, self.target, num_tokens=1000) for _ in range(3)]
        self._after_s = rng.uniform(0.1, 2.0)

    async def inject(self, lab: Lab) -> None:
        address = lab.cluster.addresses.listen[self.target, "grpc"]
        async with open_link("vanishing", address) as link, AsyncClient(link.address) as client:
            answers = [lab.load.start(plan, client) for plan in self.plans]
            await asyncio.sleep(self._after_s)
            for answer in answers:
                answer.cancelled = answer.is_open
            link.reset()

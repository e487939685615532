"""What is a fault? Something that is injected into a running cluster, and healed a while later."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvrelay.launch.readiness import wait_listening
from tests.chaos.cluster import Cluster
from tests.chaos.load import Load
from tests.chaos.members import COORDINATORS, ETCD
from tests.chaos.plans import RequestPlan

BACK_TIMEOUT_S = 180.0
"""A member that was ended listens again within this time. A coordinator starts for half a minute on a busy machine, and
may be ended once more meanwhile."""


@dataclass(frozen=True, slots=True)
class Lab:
    """What faults work on."""

    cluster: Cluster
    load: Load


class Fault(ABC):
    """One injection. Everything about it is drawn when it is made, so that a seed says all."""

    name: str
    target: str
    """Member or link."""
    hold_s: float = 0.0
    """Between `inject` and `heal`."""
    plans: Sequence[RequestPlan] = ()
    """What it asks for beside the load."""

    @abstractmethod
    def __init__(self, rng: random.Random) -> None:
        """Draw the target, and what else there is to choose."""

    @abstractmethod
    async def inject(self, lab: Lab) -> None:
        """Do it."""

    async def heal(self, lab: Lab) -> None:  # noqa: B027 - many faults leave nothing to heal
        """Undo it, and wait until what was hit works again; called once after `inject`, whatever happened."""

    async def run(self, lab: Lab) -> None:
        """All of it."""
        try:
            await self.inject(lab)
            await asyncio.sleep(self.hold_s)
        finally:
            await self.heal(lab)

    @property
    def coordinators(self) -> Collection[str]:
        """Those whose clients may lose their streams by it."""
        return ()

    @property
    def is_reached(self) -> bool:
        """Whether it struck: it may depend on what the load does."""
        return True


class MemberFault(Fault):
    """Hits one process out of `members`."""

    members: Collection[str]

    def __init__(self, rng: random.Random) -> None:
        self.target = rng.choice(sorted(self.members))

    @property
    def coordinators(self) -> Collection[str]:
        return {self.target} & set(COORDINATORS)


async def wait_back(cluster: Cluster, name: str, start: int) -> None:
    """Until a member listens that has been ended since this start, a coordinator until it can serve.

    Raises `TimeoutError`.
    """
    kind = "client" if name == ETCD else "grpc"
    async with asyncio.timeout(BACK_TIMEOUT_S):
        while cluster.num_starts[name] == start:
            await asyncio.sleep(0.1)
        await wait_listening(cluster.addresses.listen[name, kind])
        while name in COORDINATORS and name not in cluster.serving:
            await asyncio.sleep(0.1)

"""Workers that die at named points of a hand-off."""

from __future__ import annotations

import asyncio
import random

from tests.chaos.faults.base import Fault, Lab, wait_back
from tests.chaos.members import DECODE, PREFILL
from tests.chaos.points import POINTS

_REACH_TIMEOUT_S = 8.0
"""For the load to bring the worker to the point."""


class KillAtPoint(Fault):
    """The worker kills itself when it comes to the point."""

    point: str

    def __init__(self, rng: random.Random) -> None:
        point = POINTS[self.point]
        self.target = rng.choice(PREFILL if point.role == "prefill" else DECODE)
        self._passes = rng.randrange(point.most)
        self._reached = False
        self._start = 0

    @property
    def is_reached(self) -> bool:
        return self._reached

    async def inject(self, lab: Lab) -> None:
        cluster = lab.cluster
        await cluster.wait_running(self.target)
        self._start = cluster.expect_end(self.target)
        cluster.armory.arm(self.target, self.point, self._passes)
        try:
            async with asyncio.timeout(_REACH_TIMEOUT_S):
                while cluster.num_starts[self.target] == self._start:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass
        finally:
            self._reached = not cluster.armory.disarm(self.target)
            if not self._reached:
                cluster.expect_no_end(self.target, self._start)

    async def heal(self, lab: Lab) -> None:
        if self._reached:
            await wait_back(lab.cluster, self.target, self._start)


ARMED_FAULTS = [type(f"KillAt_{point}", (KillAtPoint,), {"name": f"at-{point}", "point": point}) for point in POINTS]
"""One for each point."""

"""One chaos run, from the first process to the last look at what is left."""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.checks import leaks_of, left_behind, unmapped_shared_memory
from tests.chaos.cluster import Cluster, open_cluster
from tests.chaos.engines import SIMULATED, TestedEngine
from tests.chaos.faults.base import BACK_TIMEOUT_S, Lab
from tests.chaos.faults.schedule import EVERY_S, Due, once_each, schedule
from tests.chaos.findings import Findings, Injection, judge
from tests.chaos.load import TIMEOUT_S, Load, open_load
from tests.chaos.plans import RATE_PER_S, RequestPlan, request_plans
from tests.chaos.reference import again_and_again, fitted, learn, small_plans

_SETTLE_TIMEOUT_S = TIMEOUT_S + 10.0
_REST_S = 2.0
"""Between two faults in turn, for what is asked meanwhile to be under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosConfig:
    """What a run is to be."""

    seconds: float = 600.0
    """How long the load lasts; starting and checking come on top."""
    seed: int = 1
    faults: Sequence[str] = field(default_factory=tuple)
    """Names out of the catalogue; all of it when empty."""
    every_s: float = EVERY_S
    rate_per_s: float = RATE_PER_S
    keep: bool = False
    """Whether the logs stay although all is well."""
    engine: TestedEngine = SIMULATED
    once_each: bool = False
    """One fault after the other, each kind once, the next when the cluster is whole again; `seconds` and `every_s` do
    not count then."""


@dataclass(slots=True)
class _Run:
    config: ChaosConfig
    say: Callable[[str], None]
    injections: list[Injection] = field(default_factory=list)
    began_s: float = 0.0

    async def serve(self, cluster: Cluster, load: Load) -> None:
        """Load and faults, until the last request has ended and the last fault is healed."""
        config = self.config
        lab = Lab(cluster, load)
        due = once_each(config.seed, config.faults) if config.once_each else self._schedule()
        plans = request_plans(config.seed, config.rate_per_s)
        if not config.engine.is_model_known:
            plans = await self._learn(load, due)
        self.began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(load.run(plans, math.inf if config.once_each else config.seconds), name="load")
            if config.once_each:
                await self._inject_in_turn(due, lab)
                asking.cancel()
            else:
                await self._inject_all(due, lab)
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                await load.wait_ended()
        except TimeoutError:
            self.say(f"{len(load.open_answers)} requests never end")
            load.abandon()

    def _schedule(self) -> list[Due]:
        config = self.config
        return schedule(config.seed, config.seconds, config.faults, config.every_s)

    async def _learn(self, load: Load, due: Sequence[Due]) -> Iterator[RequestPlan]:
        """What comes while nothing is broken; of the load and of what faults ask for."""
        self.say("asking for everything once while nothing is broken")
        learned = await learn(load, small_plans(self.config.seed))
        for each in due:
            each.fault.plans = await learn(load, [fitted(plan) for plan in each.fault.plans])
        return again_and_again(learned, self.config.seed, self.config.rate_per_s)

    async def _inject_in_turn(self, due: Sequence[Due], lab: Lab) -> None:
        for each in due:
            await asyncio.sleep(_REST_S)
            await self._inject(Due(time.monotonic() - self.began_s, each.fault), lab)
            await lab.cluster.wait_whole(BACK_TIMEOUT_S)

    async def _inject_all(self, due: Sequence[Due], lab: Lab) -> None:
        async with asyncio.TaskGroup() as tasks:
            for each in due:
                await asyncio.sleep(max(0.0, self.began_s + each.at_s - time.monotonic()))
                tasks.create_task(self._inject(each, lab), name=each.fault.name)

    async def _inject(self, due: Due, lab: Lab) -> None:
        fault = due.fault
        injection = Injection(fault, time.monotonic(), len(lab.load.open_answers))
        self.injections.append(injection)
        self.say(f"{due.at_s:6.1f} s  {fault.name} {fault.target}, {injection.num_in_flight} requests in flight")
        try:
            await fault.run(lab)
        except TimeoutError:
            injection.error = f"{fault.name} {fault.target} was not healed in time"
            self.say(injection.error)
        injection.healed_s = time.monotonic()


async def run_chaos(config: ChaosConfig, say: Callable[[str], None]) -> Findings:
    """Run it all. The logs stay where `say` tells when something is bad."""
    directory = Path(tempfile.mkdtemp(prefix="kvr-chaos-"))
    shared_memory = unmapped_shared_memory()
    run = _Run(config, say)
    say("starting the cluster")
    async with open_cluster(directory, config.engine) as cluster, open_load(cluster) as load:
        say("the cluster is ready; the load begins")
        await run.serve(cluster, load)
        say("the load is over; looking for what is left")
        leaks = await leaks_of(cluster)
    findings = Findings(
        seed=config.seed,
        seconds=time.monotonic() - run.began_s if config.once_each else config.seconds,
        judged=judge(load.answers, run.injections),
        injections=run.injections,
        leaks=[*leaks, *await left_behind(cluster.run_id, directory, shared_memory)],
        unexpected_ends=cluster.unexpected_ends,
    )
    if findings.is_good and not config.keep:
        shutil.rmtree(directory)
    else:
        say(f"the logs of all members stay in {directory / 'logs'}")
    return findings

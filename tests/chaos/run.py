"""One chaos run, from the first process to the last look at what is left."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.checks import leaks_of, left_behind, unmapped_shared_memory
from tests.chaos.cluster import Cluster, open_cluster
from tests.chaos.faults.base import Lab
from tests.chaos.faults.schedule import EVERY_S, Due, schedule
from tests.chaos.findings import Findings, Injection, judge
from tests.chaos.load import TIMEOUT_S, Load, open_load
from tests.chaos.plans import RATE_PER_S, request_plans

_SETTLE_TIMEOUT_S = TIMEOUT_S + 10.0


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
        due = schedule(config.seed, config.seconds, config.faults, config.every_s)
        self.began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._inject_all(due, lab), name="faults")
            await load.run(request_plans(config.seed, config.rate_per_s), config.seconds)
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                await load.wait_ended()
        except TimeoutError:
            self.say(f"{len(load.open_answers)} requests never end")
            load.abandon()

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
    async with open_cluster(directory) as cluster, open_load(cluster) as load:
        say("the cluster is ready; the load begins")
        await run.serve(cluster, load)
        say("the load is over; looking for what is left")
        leaks = await leaks_of(cluster)
    findings = Findings(
        seed=config.seed,
        seconds=config.seconds,
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

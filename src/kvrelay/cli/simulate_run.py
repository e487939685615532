"""How does a simulation run on a terminal: from options to a cluster, progress, what it tells?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvrelay.cli.failure import WRONG_USAGE, fail
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.simulator import simulation
from kvrelay.simulator.config import ClusterConfig, EngineLimits, Hardware
from kvrelay.simulator.details import details_of, notes
from kvrelay.simulator.known_times import known_times, read_times
from kvrelay.simulator.live_cluster import LiveWorkers
from kvrelay.simulator.simulation import Simulated, simulate
from kvrelay.simulator.timing import FormulaTimes, TimeModel
from kvrelay.workload.run_record import RunRecord, record_of
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """What is simulated, as the command line has it."""

    policy: str
    local_prefill: Literal["when-cheaper", "never", "always"]
    num_coordinators: int
    hardware: str
    """Says nothing where workers are like live ones."""
    times: Path | None
    num_prefill: int
    num_decode: int
    num_both: int
    max_batched_tokens: int | None
    """None, here and below: what the live workers have, or else the default."""
    store_gib: float | None
    link_gb_per_s: float | None
    enforce_targets: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A simulation that has ended."""

    arms: Arms
    requests: Sequence[TraceRequest]
    targets: Targets
    cluster: ClusterConfig
    live: LiveWorkers | None
    simulated: Simulated

    def report(self, name: str, load: Mapping[str, Any]) -> tuple[RunRecord, list[str]]:
        """The record, and sentences for people."""
        hardware, engine = self.cluster.hardware, self.cluster.engine
        details = details_of(self.simulated, self.requests, hardware.block_tokens)
        config = {
            **load,
            **asdict(self.arms),
            "hardware": None if self.live else self.arms.hardware,
            "times": str(self.arms.times) if self.arms.times else None,
            "live_times": asdict(self.live.times) if self.live else None,
            "max_batched_tokens": engine.max_batched_tokens,
            "store_gib": hardware.store_bytes / 2**30,
            "link_gb_per_s": hardware.link_bytes_per_s / 1e9,
        }
        record = record_of(
            self.simulated.outcomes, self.targets, name=name, kind="simulation", config=config, details=details
        )
        return record, notes(details)


def run(requests: Sequence[TraceRequest], arms: Arms, targets: Targets, live: LiveWorkers | None = None) -> Finished:
    """Workers are like the live ones, if any. Leaves with a message when there is no such cluster."""
    try:
        config, times = _cluster(arms, requests[0], live), FormulaTimes(live.times) if live else _times(arms)
    except OSError as error:
        fail(f"--times {arms.times} cannot be read: {error.strerror}", WRONG_USAGE)
    except ValueError as error:
        fail(str(error), WRONG_USAGE)
    cost = CostConfig(local_prefill=arms.local_prefill)
    schedulers = [make_scheduler(arms.policy, arms.seed + number, cost) for number in range(arms.num_coordinators)]
    enforced = targets if arms.enforce_targets else Targets()
    with _progress(len(requests)) as show:
        simulated = simulate(requests, config, times, schedulers, enforced, show)
    return Finished(arms=arms, requests=requests, targets=targets, cluster=config, live=live, simulated=simulated)


def _cluster(arms: Arms, request: TraceRequest, live: LiveWorkers | None) -> ClusterConfig:
    """Blocks are those of the trace; of a trace without prefixes, which knows none, the live workers'."""
    engine = live.engine if live else EngineLimits()
    hardware = live.hardware if live else Hardware()
    if request.block_ids or not live:
        hardware = replace(hardware, block_tokens=request.block_tokens)
    if arms.max_batched_tokens is not None:
        engine = replace(engine, max_batched_tokens=arms.max_batched_tokens)
    if arms.store_gib is not None:
        hardware = replace(hardware, store_bytes=int(arms.store_gib * 2**30))
    if arms.link_gb_per_s is not None:
        hardware = replace(hardware, link_bytes_per_s=arms.link_gb_per_s * 1e9)
    return ClusterConfig(
        num_prefill=arms.num_prefill,
        num_decode=arms.num_decode,
        num_both=arms.num_both,
        engine=engine,
        hardware=hardware,
        seed=arms.seed,
    )


def _times(arms: Arms) -> TimeModel:
    return read_times(arms.times, arms.hardware) if arms.times else known_times(arms.hardware)


@contextmanager
def _progress(num_requests: int) -> Iterator[simulation.Progress]:
    """Shows how it goes, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"kvrelay: simulating {num_requests} requests", file=sys.stderr)
        yield lambda *_: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=num_requests)

        def show(num_arrived: int, num_ended: int) -> None:
            progress.update(task, completed=num_ended, description=f"in flight {num_arrived - num_ended}")

        yield show

"""How is a load served by a cluster of simulated workers? One call, under virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.simulator.balance import Balance
from kvrelay.simulator.belief import believed_times
from kvrelay.simulator.block_names import BlockNamer
from kvrelay.simulator.cluster import make_views, make_workers
from kvrelay.simulator.config import ClusterConfig
from kvrelay.simulator.coordinator import SimulatedCoordinator, Terms
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.telling import connect
from kvrelay.simulator.timing import TimeModel
from kvrelay.simulator.worker import SimulatedWorker
from kvrelay.workload.outcome import Outcome
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceRequest

Progress = Callable[[int, int], object]
"""Called now and then with how many requests have come, and how many of these have ended."""
_PROGRESS_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came of a load."""

    outcomes: Sequence[Outcome]
    """One for each request, in their order."""
    workers: Sequence[SimulatedWorker]
    coordinators: Sequence[SimulatedCoordinator]
    duration_s: float
    """Until nothing was left to do."""
    idle_while_waiting: dict[str, float]
    """Role -> share of its workers' time in which they had no request while one waited elsewhere."""
    num_events: int


def simulate(
    requests: Sequence[TraceRequest],
    config: ClusterConfig,
    times: TimeModel,
    schedulers: Sequence[Scheduler],
    targets: Targets,
    on_progress: Progress = lambda *_: None,
) -> Simulated:
    """Serve a load, at least one request, to its end. The same arguments have the same result, to the last bit.

    Engines take `times`; what coordinators believe of them is the formula fitted to that. Each of `schedulers` makes a
    coordinator, and requests go to these in turn. Plans are to meet `targets`.
    """
    loop, balance, outcomes = EventLoop(), Balance(), dict[int, Outcome]()
    workers = make_workers(loop, config, times, requests)
    believed = believed_times(times, config.engine.max_batched_tokens)

    def on_outcome(outcome: Outcome) -> None:
        outcomes[outcome.index] = outcome

    namer = BlockNamer(config.hardware.block_tokens)

    def on_waiting(change: int) -> None:
        balance.queued(loop.now_s, change)

    terms = Terms(targets=targets, admission=config.admission, on_waiting=on_waiting)
    coordinators = [
        SimulatedCoordinator(loop, scheduler, workers, make_views(workers, config, believed), namer, terms, on_outcome)
        for scheduler in schedulers
    ]
    phases = np.random.default_rng(config.seed).random(len(workers)).tolist()
    for worker, phase in zip(workers, phases, strict=True):
        connect(worker, coordinators, config, phase)
        balance.follow(worker)
    turns = cycle(coordinators)

    def arrive(number: int) -> None:
        if number % _PROGRESS_EVERY == 0:
            on_progress(number, len(outcomes))
        if number + 1 < len(requests):
            loop.at(requests[number + 1].arrived_s, arrive, number + 1)
        next(turns).submit(requests[number])

    loop.at(requests[0].arrived_s, arrive, 0)
    loop.run()
    on_progress(len(requests), len(outcomes))
    return Simulated(
        outcomes=[outcomes[request.index] for request in requests],
        workers=workers,
        coordinators=coordinators,
        duration_s=loop.now_s,
        idle_while_waiting=balance.idle_while_waiting(loop.now_s),
        num_events=loop.num_events,
    )

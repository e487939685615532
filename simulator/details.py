"""What does a simulation tell beside how the load was served?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from kvrelay.simulator.oracle import cachable_tokens
from kvrelay.simulator.simulation import Simulated
from kvrelay.simulator.worker import SimulatedWorker
from kvrelay.workload.outcome import Status
from kvrelay.workload.trace import TraceRequest


def details_of(simulated: Simulated, requests: Sequence[TraceRequest], block_tokens: int) -> dict[str, Any]:
    """Ready for JSON."""
    counts = [coordinator.counts for coordinator in simulated.coordinators]
    cachable = cachable_tokens(requests, block_tokens)
    completed = [outcome for outcome in simulated.outcomes if outcome.status is Status.COMPLETED]
    num_cachable_tokens = sum(cachable[outcome.index] for outcome in completed)
    return {
        "simulated_s": simulated.duration_s,
        "num_split": sum(count.num_split for count in counts),
        "num_local": sum(count.num_local for count in counts),
        "num_fetched": sum(count.num_fetched for count in counts),
        "oracle_hit_share": (
            sum(outcome.num_cached_tokens for outcome in completed) / num_cachable_tokens
            if num_cachable_tokens
            else None
        ),
        "busy_share": busy_share(simulated.workers, simulated.duration_s),
        "idle_while_waiting_share": simulated.idle_while_waiting,
        "num_computed_prompt_tokens": sum(worker.num_prefilled_tokens for worker in simulated.workers),
        "num_preemptions": sum(worker.engine.num_preemptions for worker in simulated.workers),
        "num_events": simulated.num_events,
    }


def busy_share(workers: Iterable[SimulatedWorker], duration_s: float) -> dict[str, float]:
    """Role -> share of the time in which its engines had a step under way."""
    by_role = defaultdict(list)
    for worker in workers:
        by_role[worker.role_name].append(worker.engine.busy_s)
    return {role: sum(busy) / (len(busy) * duration_s) if duration_s > 0 else 0.0 for role, busy in by_role.items()}


def notes(details: dict[str, Any]) -> list[str]:
    """Sentences for people."""
    where = f"{details['num_split']:,} on a prefill and a decode worker, {details['num_local']:,} on one alone"
    said = [f"Plans: {where}; for {details['num_fetched']:,} of them a part of the prompt was fetched from another."]
    if details["oracle_hit_share"] is not None:
        said.append(f"Prefix hits: {details['oracle_hit_share']:.1%} of those of an oracle with one store for all.")
    for role, busy in details["busy_share"].items():
        idle = details["idle_while_waiting_share"][role]
        said.append(f"Workers for {role}: busy {busy:.1%}; idle while a request waited elsewhere {idle:.2%}.")
    if details["num_preemptions"]:
        said.append(f"{details['num_preemptions']:,} times an engine was short of memory and preempted a request.")
    return said

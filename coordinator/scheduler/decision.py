"""What does the scheduler answer? A pair of workers, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.coordinator.scheduler.view import WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: WorkerView | None
    decode: WorkerView
    source: WorkerView | None = None
    """Who holds more of the prompt's prefix than the worker that computes it, so much that fetching it pays."""


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One way to serve a request. Seconds are predictions."""

    prefill_worker_id: str = ""
    """Empty: the decode worker computes the prompt itself."""
    decode_worker_id: str
    wait_s: float = 0.0
    """For what the worker that computes the prompt has to compute before."""
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    """What of the transfer is not hidden behind the computing."""
    itl_s: float = 0.0
    num_cached_tokens: int = 0
    """Of the prompt, stored at the worker that would compute it."""
    num_stored_tokens: int = 0
    """The same at the decode worker."""
    cost: float = 0.0
    """What the policy compares; seconds where it is "cost"."""
    excluded: str = ""
    """Why it was not to be had; empty when it was."""

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.prefill_s + self.transfer_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A plan, and what it was chosen from."""

    plan: Plan
    policy: str
    reason: str
    """One sentence."""
    chosen: Candidate
    others: Sequence[Candidate] = ()
    """Those that were looked at, by their cost; the best few."""

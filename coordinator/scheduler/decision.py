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
    """Seconds, as the policy "cost" counts."""
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
    basis: str
    """What the policy looks for: the beginning of `reason`."""
    num_prompt_tokens: int
    chosen: Candidate
    others: Sequence[Candidate] = ()
    """Those that were looked at, by their cost; the best few. May be made only when it is read."""

    @property
    def reason(self) -> str:
        """One sentence."""
        chosen, total = self.chosen, self.num_prompt_tokens
        computing = chosen.prefill_worker_id or chosen.decode_worker_id
        source = f", fetched from {self.plan.source.worker_id}" if self.plan.source else ""
        sentence = (
            f"{self.basis}: {computing} computes {total - chosen.num_cached_tokens} of {total} tokens{source} in "
            f"{chosen.prefill_s:.3f} s after a wait of {chosen.wait_s:.3f} s"
        )
        if chosen.prefill_worker_id:
            sentence += (
                f", {chosen.decode_worker_id} has {chosen.num_stored_tokens} of them and waits "
                f"{chosen.transfer_s:.3f} s for the rest"
            )
        sentence += f", then a token every {chosen.itl_s:.3f} s"
        if self.others:
            best = self.others[0]
            where = best.prefill_worker_id or "no prefill worker"
            sentence += (
                f"; next best is {where} with {best.decode_worker_id}, cost {best.cost:.3f} to {chosen.cost:.3f}"
            )
        return sentence

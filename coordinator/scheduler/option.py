"""What does a request cost with one pair of workers? A prompt's estimate and a decode worker's, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.decision import Candidate, Plan
from kvrelay.coordinator.scheduler.estimates import DecodeEstimate, PromptEstimate, bytes_per_s


class Option(NamedTuple):
    """A way to serve a request; the cheapest is the least."""

    cost: float
    ttft_s: float
    transfer_s: float
    prompt: PromptEstimate
    decode: DecodeEstimate

    @property
    def is_local(self) -> bool:
        return self.prompt.worker is self.decode.worker

    @property
    def idle_ttft_s(self) -> float:
        """If nobody had to be waited for."""
        return self.prompt.fetch_s + self.prompt.prefill_s + self.transfer_s

    def plan(self) -> Plan:
        return Plan(
            prefill=None if self.is_local else self.prompt.worker,
            decode=self.decode.worker,
            source=self.prompt.source,
        )

    def candidate(self) -> Candidate:
        return Candidate(
            prefill_worker_id="" if self.is_local else self.prompt.worker.worker_id,
            decode_worker_id=self.decode.worker.worker_id,
            wait_s=self.ttft_s - self.prompt.prefill_s - self.transfer_s,
            prefill_s=self.prompt.prefill_s,
            transfer_s=self.transfer_s,
            itl_s=self.decode.itl_s,
            num_cached_tokens=self.prompt.num_cached_tokens,
            num_stored_tokens=self.decode.num_stored_tokens,
            cost=self.cost,
        )


def split_option(prompt: PromptEstimate, decode: DecodeEstimate, config: CostConfig) -> Option:
    """One worker computes the prompt, and another goes on from there once it has the blocks and room for them."""
    prefill_s = prompt.prefill_s
    transfer_s = 0.0
    if missing_bytes := decode.missing_bytes:
        travel_s = missing_bytes / bytes_per_s(prompt.worker, decode.worker, config)
        transfer_s = max(0.0, travel_s - config.overlap_share * prefill_s)
    ttft_s = prompt.wait_s + prefill_s + transfer_s
    late_s = max(0.0, decode.blocked_s - ttft_s)
    lost_s = transfer_s + late_s + decode.gap_weight * (transfer_s + late_s + decode.load_s)
    cost = prompt.cost + decode.cost - decode.blocked_s + lost_s
    return Option(cost, ttft_s, transfer_s, prompt, decode)


def local_option(prompt: PromptEstimate, decode: DecodeEstimate) -> Option:
    """The decode worker computes the prompt itself, once it has room."""
    more_s = max(0.0, decode.blocked_s - prompt.wait_s)
    ttft_s = prompt.wait_s + more_s + prompt.prefill_s
    return Option(prompt.cost + more_s + decode.cost - decode.blocked_s, ttft_s, 0.0, prompt, decode)


class Candidates(Sequence[Candidate]):
    """Options as they are explained; made when somebody asks, for few requests are asked about."""

    __slots__ = ("_options",)

    def __init__(self, options: Sequence[Option]) -> None:
        self._options = options

    def __len__(self) -> int:
        return len(self._options)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        if isinstance(index, slice):
            return [option.candidate() for option in self._options[index]]
        return self._options[index].candidate()

"""What does a coordinator believe of a worker's load, between two reports?"""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.simulator.worker import LoadReport


@dataclass(slots=True)
class _Own:
    """One of this coordinator's requests at the worker."""

    num_tokens: int
    seen_from_s: float
    """Reports of this time and later count it; never, while it is in prefill elsewhere."""


class LoadAccount:
    """Own requests are known at once, those of other coordinators and what was computed meanwhile from reports.

    Keeps the figures of the view: all own prompts, less what the last report says is computed of them, or plus what it
    says others have queued; and likewise for sequences.
    """

    def __init__(self, view: WorkerView, message_s: float) -> None:
        self.view = view
        self._message_s = message_s
        self._prompts: dict[int, _Own] = {}
        self._sequences: dict[int, _Own] = {}
        self._computed_tokens = 0
        """Of the own prompts, by the last report."""
        self._others_tokens = 0
        self._others_prompts = 0
        self._others_sequences = 0
        self._others_context_tokens = 0
        """What own sequences have generated is in here, too."""

    @property
    def num_own(self) -> int:
        """Prompts and sequences of this coordinator that have not ended."""
        return len(self._prompts) + len(self._sequences)

    def add_prompt(self, index: int, num_tokens: int, now_s: float) -> None:
        """A prompt with so many tokens to compute was sent."""
        self._prompts[index] = _Own(num_tokens, now_s + self._message_s)
        self.view.num_assigned += 1
        self._refresh()

    def end_prompt(self, index: int) -> None:
        """Its first token is there."""
        prompt = self._prompts.pop(index)
        self._computed_tokens = max(0, self._computed_tokens - prompt.num_tokens)
        self._refresh()

    def add_sequence(self, index: int, num_tokens: int) -> None:
        """A sequence is the worker's to generate, once its prompt is computed."""
        self._sequences[index] = _Own(num_tokens, float("inf"))
        self.view.num_assigned += 1
        self._refresh()

    def send_sequence(self, index: int, now_s: float) -> None:
        """It was sent to the worker."""
        self._sequences[index].seen_from_s = now_s + self._message_s

    def end_sequence(self, index: int) -> None:
        del self._sequences[index]
        self._refresh()

    def take(self, report: LoadReport) -> None:
        """A report has come."""
        prompts = [own.num_tokens for own in self._prompts.values() if own.seen_from_s <= report.time_s]
        sequences = [own.num_tokens for own in self._sequences.values() if own.seen_from_s <= report.time_s]
        self._computed_tokens = max(0, sum(prompts) - report.num_queued_prompt_tokens)
        self._others_tokens = max(0, report.num_queued_prompt_tokens - sum(prompts))
        self._others_prompts = max(0, report.num_prefill_jobs - len(prompts))
        self._others_sequences = max(0, report.num_decode_jobs - len(sequences))
        self._others_context_tokens = max(0, report.num_context_tokens - sum(sequences))
        self._refresh()

    def _refresh(self) -> None:
        view = self.view
        own_tokens = sum(own.num_tokens for own in self._prompts.values())
        view.num_queued_prompt_tokens = max(0, own_tokens - self._computed_tokens) + self._others_tokens
        view.num_queued_prompts = len(self._prompts) + self._others_prompts
        view.num_running_requests = len(self._sequences) + self._others_sequences
        own_context = sum(own.num_tokens for own in self._sequences.values())
        view.num_context_tokens = own_context + self._others_context_tokens

"""How long does a simulated engine take for a step? What is asked of every time model, and the formula as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvrelay.step_times.model import StepTimes

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one prompt that one step computes."""

    num_tokens: int
    num_context_tokens: int
    """Before it; their KV is there."""
    is_last: bool = True
    """Whether it completes its prompt."""


class TimeModel(Protocol):
    """Seconds of engine steps. A model is a pure function: equal questions have equal answers."""

    def shared_s(self, chunks: Sequence[Chunk]) -> float:
        """What a step that computes these and decodes pays once only: reading the weights, launching, sampling."""

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """A step that computes these chunks and nothing else; at least one."""

    def steps_s(self, num_requests: int, num_context_tokens: int, num_steps: int) -> Seconds:
        """Consecutive decode steps of a batch; its context grows by `num_requests` tokens with each."""


def mixed_step_s(times: TimeModel, chunks: Sequence[Chunk], num_decoding: int, num_context_tokens: int) -> float:
    """A step that computes chunks of prompts, or tokens of sequences, or both."""
    if not chunks:
        return float(times.steps_s(num_decoding, num_context_tokens, 1)[0])
    prefill_s = times.prefill_s(chunks)
    if not num_decoding:
        return prefill_s
    return prefill_s + float(times.steps_s(num_decoding, num_context_tokens, 1)[0]) - times.shared_s(chunks)


class FormulaTimes:
    """The formula that workers fit to their engines (`StepTimes`), taken as the truth.

    It is fitted to whole prompts, in however many chunks these were computed, so the fixed part comes once a prompt,
    with its last chunk; the other parts add up over chunks to what the formula has for the whole.
    """

    def __init__(self, coefficients: StepTimes) -> None:
        self._of = coefficients

    def shared_s(self, chunks: Sequence[Chunk]) -> float:
        """See `TimeModel.shared_s`; chunks in the middle of prompts have no fixed part to share."""
        return min(self._of.prefill_fixed_s, self._of.step_fixed_s) if any(chunk.is_last for chunk in chunks) else 0.0

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """See `TimeModel.prefill_s`; prompts that end in one step share the fixed part."""
        total_s = sum(self._of.prefill_s(chunk.num_tokens, chunk.num_context_tokens) for chunk in chunks)
        num_shared = len(chunks) - any(chunk.is_last for chunk in chunks)
        return total_s - num_shared * self._of.prefill_fixed_s

    def steps_s(self, num_requests: int, num_context_tokens: int, num_steps: int) -> Seconds:
        context = num_context_tokens + num_requests * np.arange(num_steps)
        first_s = self._of.step_fixed_s + self._of.step_request_s * num_requests
        return np.asarray(first_s + self._of.step_context_token_s * context, dtype=np.float64)

"""How long did the engine take for prompts and for decode steps? Seen from what its steps bring."""

from __future__ import annotations

from kvrelay.engine.base import EngineStep
from kvrelay.step_times.fit import StepTimesFit
from kvrelay.step_times.model import StepTimes

_STEP_INTERVAL_S = 0.05
"""Of decode steps one in this time is a sample: they are all alike."""
_LEAST_SHARE = 0.1
"""Of the time in which prompts were computed beside decode steps, what is theirs at least."""


class StepTimer:
    """Feeds a fit with every prompt that was computed and with some of the steps that only decoded.

    Told of every token of a step and then of the step; the caller's cost is well under a microsecond a token. Prompts
    with next to nothing to compute, whose KV was stored, teach nothing.
    """

    def __init__(self, block_size_tokens: int) -> None:
        self._fit = StepTimesFit()
        self._block_size = block_size_tokens
        self._ended_s: float | None = None
        self._free_since_s = 0.0
        """End of the latest step in which no prompt was computed only in part."""
        self._decode_s = 0.0
        """What decoding took since then, beside prompts."""
        self._sampled_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self._num_decodes = 0
        self._num_context_tokens = 0
        self._num_prompts = 0
        self._num_computed_tokens = 0
        self._num_pairs = 0.0
        self._submitted_s = float("inf")
        self._num_finished = 0

    @property
    def times(self) -> StepTimes:
        """What the engine's steps take of late."""
        return self._fit.times

    def saw_first_token(self, num_prompt_tokens: int, num_cached_tokens: int, submitted_s: float) -> None:
        """A sequence got its first token in this step; so much of its prompt was stored. Its clock is the engine's."""
        num_tokens = num_prompt_tokens - num_cached_tokens
        self._num_prompts += 1
        self._num_computed_tokens += num_tokens
        self._num_pairs += num_tokens * (num_cached_tokens + num_tokens / 2)
        self._submitted_s = min(self._submitted_s, submitted_s)

    def saw_token(self, num_context_tokens: int) -> None:
        """A sequence with so many tokens got another one in this step."""
        self._num_decodes += 1
        self._num_context_tokens += num_context_tokens

    def saw_finish(self) -> None:
        """A sequence got its last token in this step."""
        self._num_finished += 1

    def end_step(self, step: EngineStep) -> None:
        """All tokens of the step were told."""
        num_sequences = step.num_running_requests + self._num_finished
        is_whole = step.has_load and self._num_decodes + self._num_prompts == num_sequences
        if self._num_prompts:
            self._sample_prompts(step.ended_s)
        elif is_whole:
            self._sample_step(step.ended_s)
        elif self._num_decodes:
            self._decode_s += self._decode_step_s()
        if self._num_prompts or is_whole:
            self._free_since_s, self._decode_s = step.ended_s, 0.0
        self._ended_s = step.ended_s
        self._begin()

    def _sample_step(self, ended_s: float) -> None:
        if self._ended_s is None or not self._num_decodes or ended_s - self._sampled_s < _STEP_INTERVAL_S:
            return
        self._sampled_s = ended_s
        self._fit.add_step(ended_s - self._ended_s, self._num_decodes, self._num_context_tokens)

    def _sample_prompts(self, ended_s: float) -> None:
        """Prompts that others' last steps delayed begin with the end of those."""
        if self._num_computed_tokens <= self._num_prompts * self._block_size:
            return
        took_s = ended_s - max(self._free_since_s, self._submitted_s)
        decode_s = self._decode_s + (self._decode_step_s() if self._num_decodes else 0.0)
        if decode_s:
            if not self._fit.num_steps:
                return  # Nobody knows yet what of it was decoding.
            took_s = max(took_s - decode_s, _LEAST_SHARE * took_s)
        self._fit.add_prefills(took_s, self._num_prompts, self._num_computed_tokens, self._num_pairs)

    def _decode_step_s(self) -> float:
        return self._fit.step_s(self._num_decodes, self._num_context_tokens)

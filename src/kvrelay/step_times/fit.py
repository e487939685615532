"""How long do an engine's prefills and decode steps take, going by those of late?"""

from __future__ import annotations

from kvrelay.step_times.model import StepTimes
from kvrelay.step_times.regression import OnlineRegression


class StepTimesFit:
    """Fits `StepTimes` to what an engine does. Before the first sample they are the guess it begins with."""

    def __init__(self, guess: StepTimes | None = None) -> None:
        guess = guess or StepTimes()
        self._prefills = OnlineRegression([guess.prefill_fixed_s, guess.prefill_token_s, guess.prefill_pair_s])
        self._steps = OnlineRegression([guess.step_fixed_s, guess.step_request_s, guess.step_context_token_s])

    @property
    def times(self) -> StepTimes:
        """As of now."""
        prefill, step = self._prefills.coefficients, self._steps.coefficients
        return StepTimes(
            prefill_fixed_s=prefill[0],
            prefill_token_s=prefill[1],
            prefill_pair_s=prefill[2],
            num_prefills=self._prefills.num_samples,
            step_fixed_s=step[0],
            step_request_s=step[1],
            step_context_token_s=step[2],
            num_steps=self._steps.num_samples,
        )

    @property
    def num_steps(self) -> int:
        """Decode steps seen."""
        return self._steps.num_samples

    def step_s(self, num_requests: int, num_context_tokens: int) -> float:
        """`times.step_s`, quicker."""
        return self._steps.predict((1.0, num_requests, num_context_tokens))

    def add_prefill(self, seconds: float, num_tokens: int, num_context_tokens: int = 0) -> None:
        """So many tokens behind so many whose KV was there took so long."""
        self.add_prefills(seconds, 1, num_tokens, num_tokens * (num_context_tokens + num_tokens / 2))

    def add_prefills(self, seconds: float, num_prompts: int, num_tokens: int, num_pairs: float) -> None:
        """The same for prompts that were computed together; all figures are sums."""
        self._prefills.add((num_prompts, num_tokens, num_pairs), seconds)

    def add_step(self, seconds: float, num_requests: int, num_context_tokens: int) -> None:
        """One decode step of so many sequences, with so much context in all, took so long."""
        self._steps.add((1.0, num_requests, num_context_tokens), seconds)

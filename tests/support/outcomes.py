"""Outcomes of loads that tests need without caring for details."""

from __future__ import annotations

import random

from kvrelay.workload.outcome import Outcome, Status


def completed(
    arrived_s: float, *token_times_s: float, num_prompt_tokens: int = 100, num_cached_tokens: int = 0
) -> Outcome:
    return Outcome(
        index=0,
        arrived_s=arrived_s,
        status=Status.COMPLETED,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=len(token_times_s),
        token_times_s=token_times_s,
    )


def ended(arrived_s: float, status: Status, error: str = "") -> Outcome:
    """Without a token."""
    return Outcome(index=0, arrived_s=arrived_s, status=status, num_prompt_tokens=100, error=error)


def mixed_load(num_requests: int, seed: int = 1) -> list[Outcome]:
    """One request every 0.1 s; one of ten is rejected, one of twenty fails."""
    numbers = random.Random(seed)
    outcomes = []
    for index in range(num_requests):
        due_s = index / 10
        if index % 10 == 3:
            outcomes.append(ended(due_s, Status.REJECTED))
        elif index % 20 == 7:
            outcomes.append(ended(due_s, Status.FAILED, "HTTP 500: broken"))
        else:
            first_s = due_s + numbers.lognormvariate(-1, 0.8)
            outcomes.append(completed(due_s, *(first_s + 0.02 * token for token in range(numbers.randint(1, 30)))))
    return outcomes

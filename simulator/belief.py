"""What would a scheduler believe of an engine that it has watched? The formula fitted to its time model."""

from __future__ import annotations

from itertools import product

import numpy as np

from kvrelay.simulator.timing import Chunk, TimeModel
from kvrelay.step_times.model import StepTimes

_PROMPTS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
_CONTEXTS = (0, 4096, 16384)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS_OF_SEQUENCES = (256, 2048, 8192, 16384)


def believed_times(times: TimeModel, max_batched_tokens: int) -> StepTimes:
    """Fitted to whole prompts, computed in chunks of `max_batched_tokens`, and to decode steps.

    Relative errors are what is made small, as in the fits of workers; no coefficient is below 0.
    """
    prompts = [(n, c) for n, c in product(_PROMPTS, _CONTEXTS)]
    prefill = _fit(
        [[1.0, n, n * (c + n / 2)] for n, c in prompts],
        [prompt_s(times, n, c, max_batched_tokens) for n, c in prompts],
    )
    steps = [(n, n * c) for n, c in product(_BATCHES, _CONTEXTS_OF_SEQUENCES)]
    step = _fit([[1.0, n, c] for n, c in steps], [float(times.steps_s(n, c, 1)[0]) for n, c in steps])
    return StepTimes(
        prefill_fixed_s=prefill[0],
        prefill_token_s=prefill[1],
        prefill_pair_s=prefill[2],
        num_prefills=len(prompts),
        step_fixed_s=step[0],
        step_request_s=step[1],
        step_context_token_s=step[2],
        num_steps=len(steps),
    )


def prompt_s(times: TimeModel, num_tokens: int, num_context_tokens: int, max_batched_tokens: int) -> float:
    """A prompt that has the engine for itself."""
    total_s = 0.0
    while num_tokens > 0:
        chunk = Chunk(min(num_tokens, max_batched_tokens), num_context_tokens, num_tokens <= max_batched_tokens)
        total_s += times.prefill_s([chunk])
        num_tokens -= chunk.num_tokens
        num_context_tokens += chunk.num_tokens
    return total_s


def _fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Least squares, relative; a coefficient that came out below 0 is 0, and the others are fitted again."""
    weighted = np.array(rows) / np.array(seconds)[:, None]
    free = list(range(weighted.shape[1]))
    while True:
        found = np.zeros(weighted.shape[1])
        found[free] = np.linalg.lstsq(weighted[:, free], np.ones(len(seconds)), rcond=None)[0]
        if found.min() >= 0:
            return [float(value) for value in found]
        free.remove(int(found.argmin()))

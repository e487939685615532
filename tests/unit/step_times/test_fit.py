"""Step times out of measured prefills and steps."""

from __future__ import annotations

import random

import pytest

from kvrelay.step_times.fit import StepTimesFit
from kvrelay.step_times.model import StepTimes

TRUE = StepTimes(
    prefill_fixed_s=0.01, prefill_token_s=1e-3, prefill_pair_s=1e-7, step_fixed_s=0.03, step_request_s=1e-3,
    step_context_token_s=1e-6,
)  # fmt: skip


def test_without_samples_the_times_are_the_guess() -> None:
    assert StepTimesFit().times == StepTimes()
    assert StepTimesFit(TRUE).times == TRUE


def test_prefills_of_any_context_are_learnt() -> None:
    fit, rng = StepTimesFit(), random.Random(1)
    for _ in range(100):
        n, context = round(10 * 300 ** rng.random()), rng.choice([0, 1000, 4000])
        fit.add_prefill(TRUE.prefill_s(n, context), n, context)
    times = fit.times
    assert times.num_prefills == 100
    assert times.num_steps == 0
    assert times.prefill_s(2000, 2000) == pytest.approx(TRUE.prefill_s(2000, 2000), rel=0.05)


def test_prompts_computed_together_count_together() -> None:
    fit, rng = StepTimesFit(), random.Random(2)
    for _ in range(100):
        sizes = [round(10 * 200 ** rng.random()) for _ in range(rng.randint(1, 4))]
        took_s = sum(TRUE.prefill_s(n) for n in sizes)
        fit.add_prefills(took_s, len(sizes), sum(sizes), sum(n * n / 2 for n in sizes))
    assert fit.times.prefill_s(100) == pytest.approx(TRUE.prefill_s(100), rel=0.05)
    assert fit.times.prefill_s(2000) == pytest.approx(TRUE.prefill_s(2000), rel=0.05)


def test_steps_are_learnt() -> None:
    fit, rng = StepTimesFit(), random.Random(3)
    for _ in range(100):
        num_requests = rng.randint(1, 64)
        context = num_requests * rng.randint(100, 4000)
        fit.add_step(TRUE.step_s(num_requests, context), num_requests, context)
    times = fit.times
    assert times.num_steps == 100
    assert times.step_s(32, 50_000) == pytest.approx(TRUE.step_s(32, 50_000), rel=0.05)

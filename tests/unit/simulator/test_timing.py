"""The formula as a time model, and steps that do both."""

from __future__ import annotations

import pytest

from kvrelay.simulator.timing import Chunk, FormulaTimes, mixed_step_s
from kvrelay.step_times.model import StepTimes

TIMES = StepTimes(
    prefill_fixed_s=0.5,
    prefill_token_s=0.01,
    prefill_pair_s=0.001,
    step_fixed_s=0.1,
    step_request_s=0.01,
    step_context_token_s=0.0001,
)


def test_chunks_of_one_step_share_its_fixed_part() -> None:
    model = FormulaTimes(TIMES)
    apart = TIMES.prefill_s(10, 5) + TIMES.prefill_s(20, 0)
    assert model.prefill_s([Chunk(10, 5), Chunk(20, 0)]) == pytest.approx(apart - 0.5)


def test_the_fixed_part_comes_once_a_prompt() -> None:
    model = FormulaTimes(TIMES)
    chunks = [Chunk(10, 0, is_last=False), Chunk(10, 10, is_last=False), Chunk(5, 20)]
    assert sum(model.prefill_s([chunk]) for chunk in chunks) == pytest.approx(TIMES.prefill_s(25))


def test_context_grows_from_step_to_step() -> None:
    steps_s = FormulaTimes(TIMES).steps_s(3, 100, 3)
    assert steps_s.tolist() == pytest.approx([TIMES.step_s(3, 100), TIMES.step_s(3, 103), TIMES.step_s(3, 106)])


def test_a_step_that_does_both_pays_once_what_they_share() -> None:
    model = FormulaTimes(TIMES)
    both_s = mixed_step_s(model, [Chunk(10, 0)], 2, 50)
    assert both_s == pytest.approx(TIMES.prefill_s(10) + TIMES.step_s(2, 50) - 0.1)
    middle_s = mixed_step_s(model, [Chunk(10, 0, is_last=False)], 2, 50)
    assert middle_s == pytest.approx(TIMES.prefill_s(10) - 0.5 + TIMES.step_s(2, 50))
    assert mixed_step_s(model, [], 2, 50) == pytest.approx(TIMES.step_s(2, 50))
    assert mixed_step_s(model, [Chunk(10, 0)], 0, 0) == pytest.approx(TIMES.prefill_s(10))

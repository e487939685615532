"""Built-in engines are like those measured, and files are read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvrelay.simulator.belief import believed_times, prompt_s
from kvrelay.simulator.known_times import HARDWARE, TimesError, known_times, read_times
from kvrelay.simulator.timing import Chunk, FormulaTimes
from kvrelay.step_times.model import StepTimes


@pytest.mark.parametrize(("hardware", "prompt_2048_s", "token_s"), [("h100", 0.137, 0.031), ("a100", 0.274, 0.045)])
def test_known_engines_take_what_was_measured(hardware: str, prompt_2048_s: float, token_s: float) -> None:
    times = known_times(hardware)
    assert times.prefill_s([Chunk(2048, 0)]) == pytest.approx(prompt_2048_s, rel=0.1)
    assert times.steps_s(1, 2048, 1)[0] == pytest.approx(token_s, rel=0.05)


@pytest.mark.parametrize("hardware", HARDWARE)
def test_what_coordinators_believe_is_near_the_truth(hardware: str) -> None:
    times = known_times(hardware)
    believed = believed_times(times, 2048)
    for num_tokens in (512, 2048, 8192, 16384):
        truth_s = prompt_s(times, num_tokens, 0, 2048)
        assert believed.prefill_s(num_tokens) == pytest.approx(truth_s, rel=0.35)
    assert believed.step_s(16, 16 * 4096) == pytest.approx(times.steps_s(16, 16 * 4096, 1)[0], rel=0.1)


def test_the_formula_is_believed_as_it_is() -> None:
    truth = StepTimes(
        prefill_fixed_s=0.02,
        prefill_token_s=1e-4,
        prefill_pair_s=1e-9,
        step_fixed_s=0.03,
        step_request_s=2e-4,
        step_context_token_s=1e-7,
    )
    believed = believed_times(FormulaTimes(truth), 1_000_000)
    for name in StepTimes.__slots__:
        if name.endswith("_s"):
            assert getattr(believed, name) == pytest.approx(getattr(truth, name), rel=1e-6)


def test_step_times_of_a_worker_are_read(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"prefill_fixed_s": 0.5, "prefill_token_s": 0.01, "prefill_pair_s": 0.0}))
    assert read_times(path, "h100").prefill_s([Chunk(100, 0)]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting"),
        ("[]", "neither a CSV nor a JSON object"),
        ('{"prefill_s": 1}', "'prefill_s' is none of prefill_fixed_s"),
        ('{"prefill_fixed_s": -1}', "prefill_fixed_s is -1; it must be a number of at least 0"),
        ('{"prefill_fixed_s": "x"}', "it must be a number"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(TimesError, match=told):
        read_times(path, "h100")

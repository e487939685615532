"""How long do engines take whose times come with this project, or in a file?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvrelay.simulator.measured_table import Measured, TableTimes, read_table
from kvrelay.simulator.timing import FormulaTimes, TimeModel
from kvrelay.step_times.model import StepTimes

MODEL, TENSOR_PARALLEL = "llama2-70b", 8

# Medians of the measurements in data/perf_model.csv of https://github.com/Mutinifni/splitwise-sim (MIT License), which
# belong to Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024.
# Columns: prompt tokens, prompts in the batch, milliseconds for the prompts, milliseconds for the next token of all.
_MEASURED: Mapping[str, Sequence[tuple[int, int, float, float]]] = {
    "h100": (
        (128, 1, 58.19, 29.87),
        (256, 1, 51.66, 28.27),
        (512, 1, 53.86, 30.56),
        (512, 2, 76.89, 30.26),
        (512, 4, 132.64, 31.79),
        (512, 8, 371.63, 32.50),
        (512, 16, 811.93, 34.17),
        (512, 32, 1551.73, 38.62),
        (512, 64, 2936.33, 50.16),
        (1024, 1, 77.91, 29.74),
        (2048, 1, 136.80, 31.05),
        (4096, 1, 390.29, 30.56),
        (8192, 1, 844.89, 31.41),
    ),
    "a100": (
        (128, 1, 65.35, 43.03),
        (256, 1, 66.76, 43.48),
        (512, 1, 93.02, 45.03),
        (512, 2, 165.94, 44.56),
        (512, 4, 292.28, 45.79),
        (512, 8, 767.62, 46.47),
        (512, 16, 2084.41, 50.44),
        (512, 32, 3524.54, 53.02),
        (512, 64, 7553.99, 71.61),
        (1024, 1, 154.46, 44.97),
        (2048, 1, 274.22, 45.44),
        (4096, 1, 661.22, 46.48),
        (8192, 1, 1549.82, 46.51),
    ),
}
HARDWARE = tuple(_MEASURED)


class TimesError(ValueError):
    """A file has no times of an engine; the message says what it should have."""


def known_times(hardware: str) -> TimeModel:
    """Of one of `HARDWARE`: Llama 2 70B on eight such GPUs."""
    rows = _MEASURED[hardware]
    return TableTimes(Measured(tokens, count, prompt / 1e3, token / 1e3) for tokens, count, prompt, token in rows)


def read_times(path: Path, hardware: str) -> TimeModel:
    """Of a file: measurements as the CSV of splitwise-sim has them, of the same model on `hardware`, or fitted
    coefficients as JSON, an object with the fields of `StepTimes`.

    Raises `TimesError` or `TableError`, and `OSError`.
    """
    if path.suffix == ".csv":
        return read_table(path, model=MODEL, hardware=f"{hardware}-80gb", tensor_parallel=TENSOR_PARALLEL)
    try:
        return FormulaTimes(step_times_of(json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise TimesError(f"{path}: {error}") from error


def step_times_of(fields: Any) -> StepTimes:
    """From JSON; what is missing has its default. Raises `TypeError` and `ValueError`."""
    names = StepTimes.__slots__
    if not isinstance(fields, dict) or not fields:
        raise TypeError(f"neither a CSV nor a JSON object with some of {', '.join(names)}")
    for name, value in fields.items():
        if name not in names:
            raise ValueError(f"{name!r} is none of {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value!r}; it must be a number of at least 0")
    return StepTimes(**fields)

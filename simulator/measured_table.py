"""How long do steps take by a table of measurements? The CSV of splitwise-sim, interpolated."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from kvrelay.simulator.timing import Chunk, Seconds

_SHORT_TOKENS = 512
"""The prompts that the table has in batches."""


class TableError(ValueError):
    """The file has no such measurements; the message names what it has."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table."""

    num_prompt_tokens: int
    num_requests: int
    prompt_s: float
    token_s: float


class TableTimes:
    """Piecewise linear between measured sizes, and onwards with the slope of the last piece.

    A step over prompts takes what so many tokens took as short prompts, and for attention beyond these what the longer
    prompts took on top, per pair of tokens. A decode step takes what a batch of its size took with short prompts, and
    for each token of context what longer prompts took on top. (The measurements: Patel et al., "Splitwise", ISCA 2024,
    sections IV and VI.)
    """

    def __init__(self, rows: Iterable[Measured]) -> None:
        rows = list(rows)
        short = [row for row in rows if row.num_requests > 1 or row.num_prompt_tokens <= _SHORT_TOKENS]
        long = [row for row in rows if row.num_requests == 1 and row.num_prompt_tokens > _SHORT_TOKENS]
        self._prefill = _Curve({row.num_prompt_tokens * row.num_requests: row.prompt_s for row in short})
        self._pair_s = _slope(
            [_pairs(row.num_prompt_tokens, 0) for row in long],
            [row.prompt_s - self._prefill.at(row.num_prompt_tokens) for row in long],
        )
        single = [row for row in rows if row.num_requests == 1 and row.num_prompt_tokens >= _SHORT_TOKENS]
        first = min(single, key=lambda row: row.num_prompt_tokens)
        self._context_token_s = _slope(
            [row.num_prompt_tokens - first.num_prompt_tokens for row in single],
            [row.token_s - first.token_s for row in single],
        )
        self._step = _Curve(
            {
                row.num_requests: row.token_s - self._context_token_s * row.num_prompt_tokens * row.num_requests
                for row in short
                if row.num_prompt_tokens == _SHORT_TOKENS
            }
        )

    def shared_s(self, chunks: Sequence[Chunk]) -> float:
        return min(self._prefill.at(1), self._step.at(1))

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        num_pairs = sum(_pairs(chunk.num_tokens, chunk.num_context_tokens) for chunk in chunks)
        return self._prefill.at(sum(chunk.num_tokens for chunk in chunks)) + self._pair_s * num_pairs

    def steps_s(self, num_requests: int, num_context_tokens: int, num_steps: int) -> Seconds:
        context = num_context_tokens + num_requests * np.arange(num_steps)
        return np.asarray(self._step.at(num_requests) + self._context_token_s * context, dtype=np.float64)


def read_table(path: Path, *, model: str, hardware: str, tensor_parallel: int) -> TableTimes:
    """The medians of the rows of one model on one hardware. Raises `TableError` and `OSError`."""
    prompts_s: dict[tuple[int, int], list[float]] = defaultdict(list)
    tokens_s: dict[tuple[int, int], list[float]] = defaultdict(list)
    known = set()
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                which = (row["model"], row["hardware"], int(row["tensor_parallel"]))
                known.add(which)
                if which == (model, hardware, tensor_parallel):
                    size = (int(row["prompt_size"]), int(row["batch_size"]))
                    prompts_s[size].append(float(row["prompt_time"]) / 1e3)
                    tokens_s[size].append(float(row["token_time"]) / 1e3)
            except (KeyError, ValueError, TypeError) as error:
                raise TableError(f"{path}, line {number}: {error!r}") from error
    if not prompts_s:
        has = "; ".join(f"{name} on {gpu} x {ranks}" for name, gpu, ranks in sorted(known)) or "nothing"
        raise TableError(f"{path} has no times of {model} on {hardware} x {tensor_parallel}; it has {has}")
    return TableTimes(Measured(*size, median(prompts_s[size]), median(tokens_s[size])) for size in sorted(prompts_s))


class _Curve:
    """Never falls: more work takes no less time, whatever the noise of measurements says."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self._x = sorted(points)
        highest = np.maximum.accumulate([max(0.0, points[x]) for x in self._x])
        self._y = [float(y) for y in highest]

    def at(self, x: int) -> float:
        last = self._x[-1]
        if x > last and len(self._x) > 1:
            slope = (self._y[-1] - self._y[-2]) / (last - self._x[-2])
            return self._y[-1] + slope * (x - last)
        return float(np.interp(x, self._x, self._y))


def _pairs(num_tokens: int, num_context_tokens: int) -> float:
    """Of a token and one that it attends to, beyond what short prompts of as many tokens have."""
    return max(0.0, num_tokens * (num_context_tokens + num_tokens / 2 - _SHORT_TOKENS / 2))


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares through the origin; not below 0."""
    squares = sum(x * x for x in xs)
    return max(0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / squares) if squares else 0.0

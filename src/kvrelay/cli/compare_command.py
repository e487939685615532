"""`kvrelay compare`: loads side by side, from clusters and from the simulator."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.failure import WRONG_USAGE, fail

if TYPE_CHECKING:
    from kvrelay.workload.run_record import RunRecord


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What --json of replay or simulate has written.")
    ],
    plots_dir: Annotated[
        Path | None, typer.Option("--plots", metavar="DIR", help="Write comparison.png and comparison.html there.")
    ] = None,
) -> None:
    """Put several loads into one table, and one picture.

    Example: kvrelay compare cost.json round-robin.json --plots results
    """
    from kvrelay.cli.load_results import console
    from kvrelay.workload.summary_table import comparison_table

    records = _by_name(files)
    console().print(comparison_table({name: record.summary for name, record in records.items()}))
    if plots_dir is not None:
        from kvrelay.workload.comparison_plots import write_comparison

        try:
            written = write_comparison("Loads compared", records, plots_dir)
        except OSError as error:
            fail(f"--plots {plots_dir}: {error.strerror}")
        console().print(f"Written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)


def _by_name(files: list[Path]) -> dict[str, RunRecord]:
    """Loads of the same name are told apart by their files."""
    from kvrelay.workload.run_record import RunRecordError, read_record

    try:
        read = [(path, read_record(path)) for path in files]
    except RunRecordError as error:
        fail(str(error), WRONG_USAGE)
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}", WRONG_USAGE)
    names = Counter(record.name for _, record in read)
    stems = Counter(path.stem for path in files)
    told_apart = {path: path.stem if stems[path.stem] == 1 else str(path) for path in files}
    return {
        record.name if names[record.name] == 1 else f"{record.name} ({told_apart[path]})": record
        for path, record in read
    }

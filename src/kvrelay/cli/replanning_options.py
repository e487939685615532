"""The options of a coordinator that say how long it stands by a request that loses its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

_PANEL = "Failures"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanningOptions:
    """Of each process."""

    max_plans: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_PANEL,
            help="So many workers one after the other may be lost with a request, or fail it, at the same token;"
            " 1 fails what loses a worker.",
        ),
    ] = 3
    wait_for_workers_s: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            rich_help_panel=_PANEL,
            help="A request that has lost its worker, or is queued, waits so long for another to come.",
        ),
    ] = 60.0

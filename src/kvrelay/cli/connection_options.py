"""Options of a coordinator about clients that only connect, say nothing, or do not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvrelay.coordinator.connection_limits import ConnectionLimits

_PANEL = "Clients"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """Of the HTTP API; `--stall-timeout` of the gRPC API as well."""

    max_connections: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=_PANEL, help="HTTP connections of one process; more are answered with 503."
        ),
    ] = 16_384
    header_timeout_s: Annotated[
        float,
        typer.Option(
            "--header-timeout",
            min=0.1,
            rich_help_panel=_PANEL,
            help="Longest time from connecting to the end of a request's headers, seconds.",
        ),
    ] = 10.0
    stall_timeout_s: Annotated[
        float,
        typer.Option(
            "--stall-timeout",
            min=0.1,
            rich_help_panel=_PANEL,
            help="A client that takes nothing of its answer for so long is disconnected, over gRPC its call ended,"
            " seconds.",
        ),
    ] = 60.0

    def limits(self) -> ConnectionLimits:
        """As the coordinator takes them."""
        from kvrelay.coordinator.connection_limits import ConnectionLimits

        return ConnectionLimits(
            max_connections=self.max_connections,
            header_timeout_s=self.header_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
        )

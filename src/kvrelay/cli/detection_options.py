"""The options that say how soon another process, or an engine, is taken for lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvrelay.heartbeat import HeartbeatConfig
    from kvrelay.worker.engine_watch import WatchConfig

_PANEL = "Failures"

HeartbeatTimeoutOption = Annotated[
    float,
    typer.Option(
        "--heartbeat-timeout-s",
        min=1.0,
        metavar="SECONDS",
        rich_help_panel=_PANEL,
        help="A coordinator and a worker that hear nothing of each other for so long part. They say something twice a"
        " second.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatOptions:
    """Of a coordinator."""

    heartbeat_timeout_s: HeartbeatTimeoutOption = 2.0

    def heartbeat(self) -> HeartbeatConfig:
        """What the process is given."""
        from kvrelay.heartbeat import HeartbeatConfig

        return HeartbeatConfig(timeout_s=self.heartbeat_timeout_s)

    def heartbeat_arguments(self) -> list[str]:
        """The same for the command line of a process."""
        return ["--heartbeat-timeout-s", str(self.heartbeat_timeout_s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionOptions(HeartbeatOptions):
    """Of a worker, or of a whole cluster."""

    engine_stuck_s: Annotated[
        float,
        typer.Option(
            min=1.0,
            metavar="SECONDS",
            rich_help_panel=_PANEL,
            help="A worker whose engine has requests and ends no step for so long ends itself, to be started again.",
        ),
    ] = 60.0
    health_interval_s: Annotated[
        float,
        typer.Option(
            min=1.0,
            metavar="SECONDS",
            rich_help_panel=_PANEL,
            help="An engine without requests is asked for a token so long after its latest; the answer is the health of"
            " the service kvrelay.v1.Worker.",
        ),
    ] = 30.0

    def watch(self) -> WatchConfig:
        """What a worker is given."""
        from kvrelay.worker.engine_watch import WatchConfig

        return WatchConfig(stuck_s=self.engine_stuck_s, health_interval_s=self.health_interval_s)

    def arguments(self) -> list[str]:
        """All of it for the command line of a worker."""
        return [
            *self.heartbeat_arguments(),
            *("--engine-stuck-s", str(self.engine_stuck_s)),
            *("--health-interval-s", str(self.health_interval_s)),
        ]

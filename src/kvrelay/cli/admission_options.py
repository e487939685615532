"""The options of a coordinator that say how many requests may wait in it, and for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvrelay.coordinator.admission.config import AdmissionConfig

_PANEL = "The queue"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionOptions:
    """Of each process; replicas have a queue each."""

    max_queued_requests: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_PANEL, help="So many may wait; more get 429.")
    ] = 2048
    max_queued_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_PANEL,
            help="So many tokens of prompts and answers may wait. One tenant may have 75 % of either.",
        ),
    ] = 8_000_000
    dispatch_ahead_s: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            rich_help_panel=_PANEL,
            help="Requests leave the queue while a worker that may compute prompts has less to compute than this.",
        ),
    ] = 0.25

    def config(self) -> AdmissionConfig:
        """What the coordinator is given."""
        from kvrelay.coordinator.admission.config import AdmissionConfig

        return AdmissionConfig(
            max_requests=self.max_queued_requests,
            max_tokens=self.max_queued_tokens,
            dispatch_ahead_s=self.dispatch_ahead_s,
        )

    def arguments(self) -> list[str]:
        """The same for the command line of a coordinator."""
        return [
            *("--max-queued-requests", str(self.max_queued_requests)),
            *("--max-queued-tokens", str(self.max_queued_tokens)),
            *("--dispatch-ahead-s", str(self.dispatch_ahead_s)),
        ]

"""What does `kvrelay` do on the command line? The commands, found here, import what they need when they run."""

from __future__ import annotations

import typer

from kvrelay import __version__
from kvrelay.cli import (
    clients,
    cluster_commands,
    compare_command,
    drain_command,
    explain_command,
    replay_command,
    simulate_command,
)
from kvrelay.cli.engine_command import EngineCommand
from kvrelay.cli.failure import EXIT_CODES
from kvrelay.cli.role_commands import role_app
from kvrelay.cli.worker_commands import DECODE_HELP, PREFILL_HELP, worker_command

app = typer.Typer(
    name="kvrelay",
    help=(
        "Serve language models with prefill and decode on separate workers.\n\n"
        "`kvrelay up` starts everything on this machine: etcd, a coordinator, workers on a small model. On several"
        " machines, start one process of each kind by hand: `coordinator`, `prefill-worker`, `decode-worker`."
    ),
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version() -> None:
    """Print the version."""
    print(__version__)


ON_THIS_MACHINE, PROCESSES, USE = "A cluster on this machine", "One process of a cluster", "Use a running cluster"
PLAN = "Plan a cluster"
app.command(cls=EngineCommand, rich_help_panel=ON_THIS_MACHINE)(cluster_commands.up)
app.command(rich_help_panel=PROCESSES)(cluster_commands.coordinator)
app.command("prefill-worker", cls=EngineCommand, help=PREFILL_HELP, rich_help_panel=PROCESSES)(
    worker_command("prefill")
)
app.command("decode-worker", cls=EngineCommand, help=DECODE_HELP, rich_help_panel=PROCESSES)(worker_command("decode"))
app.command(rich_help_panel=USE)(clients.chat)
app.command(rich_help_panel=USE)(clients.generate)
app.command(rich_help_panel=USE)(clients.workers)
app.command(rich_help_panel=USE)(explain_command.explain)
app.add_typer(role_app, rich_help_panel=USE)
app.command(rich_help_panel=USE)(drain_command.drain)
app.command(rich_help_panel=USE)(replay_command.replay)
app.command(rich_help_panel=USE)(compare_command.compare)
app.command(rich_help_panel=PLAN)(simulate_command.simulate)
app.command(rich_help_panel=USE)(version)


def main() -> None:
    """The entry point of the `kvrelay` command."""
    app()

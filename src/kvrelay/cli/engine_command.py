"""A command whose engine options follow after `--`, and that says so to whoever forgets it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand
from typer.exceptions import TyperException


class EngineCommand(TyperCommand):
    """Adds the advice to the message about an option that it does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            if error.message.startswith("No such option"):
                error.message += "; options of the engine follow after --, for example: -- --dtype float32"
            raise

"""Dataclasses become options: of their names, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner, Result

from kvrelay.cli.option_groups import grouped


@dataclass(frozen=True, kw_only=True)
class Place:
    host: Annotated[str, typer.Option()]
    port: Annotated[int, typer.Option("--at-port", min=1)] = 7


@dataclass(frozen=True, kw_only=True)
class Noise:
    loud: bool = False


def visit(place: Place, noise: Noise, words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Go there."""
    print(place, noise, words)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(grouped(visit))
    return CliRunner().invoke(app, arguments)


def test_values_come_in_their_groups() -> None:
    assert run("--host", "a").stdout == f"{Place(host='a')} {Noise()} None\n"
    given = run("--at-port", "8", "--loud", "--host", "a", "x", "y").stdout
    assert given == f"{Place(host='a', port=8)} {Noise(loud=True)} ['x', 'y']\n"


def test_it_is_a_command_like_any_other() -> None:
    assert run("--host", "a", "--at-port", "0").exit_code == 2
    assert run().exit_code == 2
    assert "Go there." in run("--help").stdout

"""The options of commands that apply a load, on a cluster or in the simulator, each described once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from kvrelay.workload.targets import Targets

_TARGETS = tuple(field.name.removesuffix("_s") for field in dataclasses.fields(Targets))
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e]*)")
_OWN_HEADERS = ("host", "content-length", "content-type", "transfer-encoding", "connection", "authorization")

LOAD = "The load"
SERVER = "The server"
RESULTS = "Results"


class Header(tuple[str, str]):
    """Name and value."""

    __slots__ = ()


def parse_targets(text: str | Targets) -> Targets:
    """`ttft=2,tpot=0.1`, in seconds. Raises `typer.BadParameter`."""
    if isinstance(text, Targets):  # an option's default comes this way too
        return text
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            limit_s = float(value)
        except ValueError:
            limit_s = 0.0
        if name not in _TARGETS or name in limits or not 0 < limit_s < float("inf"):
            raise typer.BadParameter(
                f"{part!r} is not a target; write for example ttft=2,tpot=0.1 with seconds over 0, each of"
                f" {', '.join(_TARGETS)} at most once"
            )
        limits[name] = limit_s
    return Targets(**{f"{name}_s": limit_s for name, limit_s in limits.items()})


def parse_header(text: str | Header) -> Header:
    """`name: value`. Raises `typer.BadParameter`, without the value: it may be a secret."""
    if isinstance(text, Header):
        return text
    match = _HEADER.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter("a header is written 'name: value', for example 'x-kvrelay-tenant: a'")
    if match[1].lower() in _OWN_HEADERS:
        raise typer.BadParameter(
            f"{match[1]} is set by kvrelay itself; an API key comes from the environment, KVRELAY_API_KEY"
        )
    return Header((match[1], match[2].strip()))


TraceArgument = Annotated[
    Path, typer.Argument(metavar="TRACE", help="Requests as Mooncake's JSONL or Azure's CSV has them.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, rich_help_panel=LOAD, help="Only the first so many requests.")
]
SpeedOption = Annotated[
    float,
    typer.Option(
        "--speed", min=1e-6, rich_help_panel=LOAD, help="2 lets the requests come twice as fast as they were recorded."
    ),
]
LengthScaleOption = Annotated[
    float,
    typer.Option(
        "--length-scale",
        min=1e-6,
        rich_help_panel=LOAD,
        help="Divide the lengths of prompts and answers by this; prefixes stay shared.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, rich_help_panel=LOAD, help="The same seed gives the same prompts.")
]
TargetsOption = Annotated[
    Targets,
    typer.Option(
        "--targets",
        parser=parse_targets,
        metavar="NAME=SECONDS[,...]",
        show_default="ttft=2,tpot=0.1",
        rich_help_panel=RESULTS,
        help="What a request must keep to count for the goodput: ttft (first token), tpot (mean gap between tokens),"
        " itl (longest gap), e2e (last token).",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", rich_help_panel=RESULTS, help="Write all figures; `kvrelay compare` reads it."
    ),
]
PlotsOption = Annotated[
    Path | None,
    typer.Option("--plots", metavar="DIR", rich_help_panel=RESULTS, help="Write load.png and load.html there."),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", rich_help_panel=RESULTS, help="What the load is called in plots and comparisons."),
]
DEFAULT_TARGETS = Targets(ttft_s=2.0, tpot_s=0.1)

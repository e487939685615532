"""What do addresses, sizes, weights and engine options look like on the command line?"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass

import typer

ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - only where a person asks for it
_SMALLEST_STORE_BYTES = 1 << 20
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port; an IPv6 host is written in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Addresses(tuple[Address, ...]):
    """Several addresses of one service."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(map(str, self))


class EngineArgs(tuple[str, ...]):
    """Options of the engine, as words."""

    __slots__ = ()


def parse_address(text: str | Address) -> Address:
    """`host:port`, `[ipv6]:port`, or `:port` for all interfaces. Raises `typer.BadParameter`."""
    if isinstance(text, Address):  # an option's default comes this way too
        return text
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isdecimal() or int(port) > 65535 or (":" in host and not bracketed) or "/" in host:
        raise typer.BadParameter(f"{text!r} is not an address; write HOST:PORT, for example 127.0.0.1:8000")
    return Address(host.strip("[]") or ALL_INTERFACES, int(port))


def parse_addresses(text: str | Addresses) -> Addresses:
    """Addresses with commas between them. Raises `typer.BadParameter`."""
    if isinstance(text, Addresses):
        return text
    return Addresses(parse_address(part.strip()) for part in text.split(","))


def parse_size(text: str | int) -> int:
    """Bytes from `2GiB`, `512M` (also binary), `2GB` (decimal) or a plain number. Raises `typer.BadParameter`."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 2GiB or 512MiB")
    number, unit, binary = match.groups()
    decimal = text.strip().upper().endswith("B") and unit and not binary
    return int(float(number) * (1000 if decimal else 1024) ** _EXPONENT[unit.upper()])


def parse_store_size(text: str | int) -> int:
    """Like `parse_size`, for memory that must hold some KV blocks at least. Raises `typer.BadParameter`."""
    size = parse_size(text)
    if size < _SMALLEST_STORE_BYTES:
        raise typer.BadParameter(
            f"{text} is too little: a block takes some hundred KiB to some MiB; give 16MiB or more"
        )
    return size


def parse_weight(text: str | float) -> float:
    """A positive number. Raises `typer.BadParameter`."""
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise typer.BadParameter(f"{text!r} is no weight; use a number above 0, for example 2 or 0.5")
    return weight


def parse_engine_args(text: str) -> EngineArgs:
    """Options of the engine in one string, quoted as in a shell. Raises `typer.BadParameter`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a command line: {error}") from error
    if words and not words[0].startswith("-"):
        raise typer.BadParameter(f"{text!r} has to begin with an option, for example '--tensor-parallel-size 2'")
    return EngineArgs(words)


def check_engine_options(arguments: list[str] | None) -> tuple[str, ...]:
    """The arguments after `--`. Raises `typer.BadParameter` for a stray word."""
    if arguments and not arguments[0].startswith("-"):
        raise typer.BadParameter(
            f"{arguments[0]!r} is one word too many; options of the engine follow after --,"
            " for example: -- --dtype float32"
        )
    return tuple(arguments or ())

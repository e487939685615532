"""What a handler of gRPC's gets from it, for handlers that are called without a connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import grpc

_BUGS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class AbortedError(Exception):
    """In place of gRPC's own."""


class Call:
    """Of a client that set no deadline. `abort` with a status that says that there is a bug is one."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    async def write(self, message: Any) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", _metadata: Sequence[Any] = ()) -> NoReturn:
        assert code not in _BUGS, f"{code.name}: {details}"
        assert details, "an error that says nothing"
        raise AbortedError(code, details)

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

"""How does a client talk to a coordinator? What both clients share: options, metadata, deadlines, errors."""

from __future__ import annotations

from typing import Any

import grpc

from kvrelay.errors import RETRY_AFTER_METADATA, DeadlineError, KvrelayError, NoWorkersError, error_from_grpc
from kvrelay.grpc_options import channel_options
from kvrelay.tracing import current_context, headers_of

OPTIONS = list(channel_options())

_NOT_CONNECTED = (
    # How gRPC core begins the details of what never reached a coordinator, or did not come back from it.
    "failed to connect",
    "Socket closed",
    "Stream removed",
    "recvmsg:",
    "sendmsg:",
    "connections to all backends failing",
    "Connection reset",
    "DNS resolution failed",
    "Endpoint closing",
    "GOAWAY received",
    "Cancelling all calls",
)
_NEVER_CONNECTED = ("failed to connect", "DNS resolution failed", "connections to all backends failing")


class UnreachableError(NoWorkersError):
    """No coordinator answers at the address, or the connection to it broke."""

    had_connected = False
    """Whether there was one, so that another may take over."""


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The caller's current OpenTelemetry span, so that its trace goes on in the cluster."""
    context = current_context()
    return tuple(headers_of(context).items()) if context else ()


def client_error(error: grpc.RpcError, address: str, timeout_s: float | None) -> KvrelayError:
    """The exception for a call that failed; the coordinator's message is kept."""
    code: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NOT_CONNECTED):
        unreachable = UnreachableError(f"no coordinator answers at {address}: {details}")
        unreachable.had_connected = not details.startswith(_NEVER_CONNECTED)
        return unreachable
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        return DeadlineError(f"not finished within {timeout_s} s")
    return error_from_grpc(code, details, _retry_after_s(error))


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """When the coordinator says that another attempt may succeed."""
    metadata: Any = error.trailing_metadata()  # Blocking and asyncio calls have types of their own.
    for key, value in metadata or ():
        if key == RETRY_AFTER_METADATA and str(value).isdecimal():
            return int(value) / 1e3
    return None

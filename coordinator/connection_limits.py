"""What may clients take of a coordinator that only connect, say nothing, or do not read?"""

from __future__ import annotations

import resource
from dataclasses import dataclass

_SPARE_FILES = 256
"""Of those that a process may open: for workers, etcd, logs and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Of the HTTP API, and where gRPC has no limit of its own."""

    max_connections: int = 16_384
    """More are answered with 503 and closed; fewer where the process may not open so many files."""
    header_timeout_s: float = 10.0
    """How long a client may take for headers: from connecting, or from the first byte of its next request."""
    stall_timeout_s: float = 60.0
    """A client that takes nothing of what it is sent for so long is disconnected, or its call over gRPC ended."""


def raise_open_files() -> int:
    """Let this process open as many files as it may; returns how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def connections_within(limits: ConnectionLimits, num_files: int) -> int:
    """How many connections are taken by a process that may open so many files."""
    return max(1, min(limits.max_connections, num_files - _SPARE_FILES))

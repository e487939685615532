"""Waiting for processes that are not this one's children."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable


def gone(pids: Iterable[int], *, timeout_s: float = 10.0) -> bool:
    """Wait until all of them have ended; false when one has not in time."""
    return all(_gone(pid, timeout_s) for pid in pids)


def _gone(pid: int, timeout_s: float) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        readable, _, _ = select.select([descriptor], [], [], timeout_s)
        return bool(readable)
    finally:
        os.close(descriptor)

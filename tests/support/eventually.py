"""Waits for a condition without knowing how long it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_POLL_S = 0.002


async def eventually(condition: Callable[[], object], what: str = "", *, timeout_s: float = 10.0) -> None:
    """Return as soon as `condition()` is true. Raises `AssertionError` naming `what` after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what or condition}") from None

"""How does work end that nobody waits for any longer?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from kvrelay.errors import DeadlineError


@contextlib.asynccontextmanager
async def within(timeout_s: float | None, what: str) -> AsyncIterator[None]:
    """End what is inside after this time, None: never. Raises `DeadlineError` then, which names `what`."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineError(f"the deadline of {what} passed after {timeout_s:.3g} s") from None

"""Who waits for the blocks of which request?"""

from __future__ import annotations

import asyncio


class Waiters:
    """Of one event loop."""

    def __init__(self) -> None:
        self._events: dict[str, list[asyncio.Event]] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._events

    async def wait(self, request_id: str, timeout_s: float) -> None:
        """Until `wake` is called for this request, or for `timeout_s`."""
        event = asyncio.Event()
        self._events.setdefault(request_id, []).append(event)
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            self._events[request_id].remove(event)
            if not self._events[request_id]:
                del self._events[request_id]

    def wake(self, request_id: str) -> None:
        """End all waits for this request. Unknown ids are fine."""
        for event in self._events.get(request_id, ()):
            event.set()

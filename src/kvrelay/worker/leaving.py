"""When does a worker leave, and how long may its requests go on then?"""

from __future__ import annotations

import asyncio


class Leaving:
    """Asked for by a signal or over the network, whichever comes first."""

    def __init__(self, asked: asyncio.Event, drain_s: float) -> None:
        """`asked` is what a signal sets; `drain_s` counts unless somebody who asks says otherwise."""
        self._asked = asked
        self.drain_s = drain_s

    def ask(self, drain_s: float | None) -> None:
        """Leave now. Once it has been asked for, nothing changes any more."""
        if not self._asked.is_set():
            if drain_s is not None:
                self.drain_s = drain_s
            self._asked.set()

    async def wait(self) -> None:
        """Until it is asked for."""
        await self._asked.wait()

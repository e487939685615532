"""How is a process asked to end?"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

ASKING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT of this process, from here to its end. Belongs to the main thread.

    While the process starts it has nothing to finish, and may block its event loop for a long time: the first signal
    ends it at once, by `end(0)`. Once it has said that it is `ready` the first signal sets an event, and the second one
    ends it at once, by `end(128 + the signal's number)`, whatever it is doing.
    """

    def __init__(self, end: Callable[[int], NoReturn]) -> None:
        """`end` runs between any two instructions of the main thread: it must not take locks, nor log."""
        self._end = end
        self._was_asked = False
        self._on_asked: Callable[[], object] | None = None
        for number in ASKING:
            signal.signal(number, self._on_signal)

    def ready(self) -> asyncio.Event:
        """An event of the running loop that the next signal sets."""
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        # Wakes the loop, which a plain call from a signal handler would not.
        self._on_asked = lambda: loop.call_soon_threadsafe(asked.set)
        return asked

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._on_asked is None or self._was_asked:
            self._end(128 + number if self._was_asked else 0)
        self._was_asked = True
        self._on_asked()

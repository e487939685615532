"""What happens next? Virtual time, and what is due in it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventLoop:
    """Calls what is due in the order of its time; what is due at one time, in the order it was asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        """Called so far."""
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._num_asked = 0

    def at(self, time_s: float, call: Callable[..., object], *args: Any) -> None:
        """Call once at `time_s`; what should have been earlier is due now."""
        self._num_asked += 1
        heapq.heappush(self._due, (max(time_s, self.now_s), self._num_asked, call, args))

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self.at(self.now_s + delay_s, call, *args)

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now_s, _, call, args = heapq.heappop(self._due)
            self.num_events += 1
            call(*args)

"""What happened to one request, when: the coordinator's events and those its workers report."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvrelay.v1 import common_pb2


class RequestTimeline:
    """Collects events in the order in which they are told; `to_proto` sorts them by time."""

    __slots__ = ("_clock_ns", "_counters", "_events", "began_s")

    def __init__(
        self, clock_ns: Callable[[], int] = time.time_ns, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.began_s = clock_s()
        """By a clock that never goes back; the events are by one that other machines have, too."""
        self._clock_ns = clock_ns
        self._events: list[tuple[int, str]] = []
        self._counters: dict[str, int] = {}

    def mark(self, name: str) -> None:
        self._events.append((self._clock_ns(), name))

    def between_s(self, first: str, then: str) -> float:
        """From one event to a later one; 0 unless there are both."""
        times = {name: unix_ns for unix_ns, name in self._events}
        return (times[then] - times[first]) / 1e9 if first in times and then in times else 0.0

    def merge(self, timeline: common_pb2.Timeline) -> None:
        """Take a worker's events and counters; a counter that is known grows."""
        self._events.extend((event.unix_ns, event.name) for event in timeline.events)
        for name, value in timeline.counters.items():
            self._counters[name] = self._counters.get(name, 0) + value

    def to_proto(self) -> common_pb2.Timeline:
        message = common_pb2.Timeline(counters=self._counters)
        for unix_ns, name in sorted(self._events):
            message.events.add(name=name, unix_ns=unix_ns)
        return message

"""May a worker get requests that has failed some, or is far slower than it should be?"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    max_failures: int = 3
    """In a row; a lost connection counts like a request that was failed."""
    slow_factor: float = 10.0
    """Work that takes so many times longer than the worker's own fit says is slow."""
    slow_window_s: float = 1.0
    """Work is judged in portions that took so long: a hiccup is none."""
    max_slow_windows: int = 2
    """In a row."""
    pause_s: float = 5.0
    """How long it gets nothing then; twice as long after each probe that goes wrong."""
    max_pause_s: float = 60.0


class State(enum.Enum):
    CLOSED = enum.auto()
    """It gets requests like any other."""
    OPEN = enum.auto()
    """It gets none until the pause is over; then one, the probe."""
    PROBING = enum.auto()
    """It has the probe, and gets nothing else until that went well, or for another pause."""


class Breaker:
    """Of one worker. No I/O.

    A refusal of a bad request is no failure: the caller tells of nothing that is not the worker's own. (The pattern:
    M. Nygard, Release It!, "Circuit Breaker".)
    """

    def __init__(self, config: BreakerConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config or BreakerConfig()
        self._clock = clock
        self._pause_s = self._config.pause_s
        self._paused_until_s = 0.0
        self._num_failures = 0
        self._num_slow = 0
        self._observed_s = self._expected_s = 0.0
        self.state = State.CLOSED

    def allows(self) -> bool:
        """Whether the worker may get a request now."""
        return self.state is State.CLOSED or self._clock() >= self._paused_until_s

    def sent(self) -> None:
        """It got a request."""
        if self.state is not State.CLOSED and self.allows():
            self.state = State.PROBING
            self._paused_until_s = self._clock() + self._pause_s

    def succeeded(self) -> None:
        """A request got all that it was to get there."""
        self._num_failures = 0
        if self.state is State.PROBING:
            self.state = State.CLOSED
            self._pause_s = self._config.pause_s

    def failed(self) -> None:
        """A request got nothing there, and not by its own fault."""
        self._num_failures += 1
        if self.state is State.PROBING or self._num_failures >= self._config.max_failures:
            self._open()

    def took(self, observed_s: float, expected_s: float) -> None:
        """Work was done; `expected_s` is what the worker's fit said before."""
        self._observed_s += observed_s
        self._expected_s += expected_s
        if self._observed_s < self._config.slow_window_s:
            return
        is_slow = self.is_slow(self._observed_s, self._expected_s)
        self._observed_s = self._expected_s = 0.0
        self._num_slow = self._num_slow + 1 if is_slow else 0
        if is_slow and (self.state is State.PROBING or self._num_slow >= self._config.max_slow_windows):
            self._open()

    def is_slow(self, observed_s: float, expected_s: float) -> bool:
        """Whether work that takes so long, done or not, is what nobody should wait for."""
        return observed_s >= max(self._config.slow_window_s, self._config.slow_factor * expected_s)

    def _open(self) -> None:
        """What had been sent before may fail still: that is nothing new."""
        if self.state is State.OPEN:
            return
        if self.state is State.PROBING:
            self._pause_s = min(self._config.max_pause_s, 2 * self._pause_s)
        self.state = State.OPEN
        self._num_failures = self._num_slow = 0
        self._paused_until_s = self._clock() + self._pause_s

"""When has the other end of a stream been silent for too long? Policy without I/O, and the loop that asks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Never

_IN_TIME = 2.0
"""A tick that comes after so many times its interval is late."""
_SLOWEST_BYTES_PER_S = 8 << 20
"""Of a large message: as slow as it may come before the stream is taken for broken."""
LARGE_MESSAGE_BYTES = 1 << 20
"""A message of more is announced: nothing else is heard while it comes."""
BUSY_BYTES_PER_S = 1 << 20
"""A coordinator that turns log probabilities into answers, which it does in one go, is not slower than this."""


class SilentError(Exception):
    """The other end said nothing for too long; the message tells for how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatConfig:
    """Of both ends of a stream."""

    interval_s: float = 0.5
    """Something is said at least so often."""
    timeout_s: float = 2.0
    """Of silence; then the stream is taken for broken."""

    @property
    def interval_ms(self) -> int:
        """What hello promises."""
        return round(1e3 * self.interval_s)

    def silence_of(self, promised_ms: int, clock: Callable[[], float] = time.monotonic) -> Silence | None:
        """For an end that promises to say something so often; None when it promises nothing (0)."""
        if not promised_ms:
            return None
        return Silence(max(self.timeout_s, 4e-3 * promised_ms), tick_s=self.interval_s / 2, clock=clock)


DEFAULT_HEARTBEAT = HeartbeatConfig()


class Silence:
    """The time in which somebody could have been heard, and was not.

    `tick` belongs to the event loop that hears, and is called every `tick_s`. Only ticks that come in time count: a
    process that was stopped, or whose loop was busy, does not blame others for it. After a late tick half of
    `timeout_s` is left at least, in which what has come meanwhile is read.
    """

    def __init__(self, timeout_s: float, *, tick_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self.tick_s = tick_s
        self._clock = clock
        self._latest_s = clock()
        self._silent_s = 0.0
        self._was_heard = False
        """Since the latest tick."""
        self._excused_until_s = 0.0

    def heard(self, next_message_bytes: int = 0, busy_ms: int = 0) -> None:
        """Something came. A large message is announced, which takes its time; or work, from which nothing is heard."""
        self._was_heard = True
        if busy_ms:
            self._excused_until_s = max(self._excused_until_s, self._clock() + busy_ms / 1e3)
        self._silent_s = -next_message_bytes / _SLOWEST_BYTES_PER_S

    def tick(self) -> bool:
        """Whether it has been silent for too long."""
        now_s = self._clock()
        elapsed_s, self._latest_s = now_s - self._latest_s, now_s
        was_heard, self._was_heard = self._was_heard, False
        if elapsed_s > _IN_TIME * self.tick_s:
            self._silent_s = min(self._silent_s, self.timeout_s / 2)
        elif not was_heard and now_s >= self._excused_until_s:
            self._silent_s += elapsed_s
            return self._silent_s >= self.timeout_s
        return False


async def until_silent(silence: Silence, who: str) -> Never:
    """Tick until it is silent for too long. Raises `SilentError` then."""
    while not silence.tick():  # noqa: ASYNC110 - time passes, nothing happens
        await asyncio.sleep(silence.tick_s)
    raise SilentError(f"{who} said nothing for {silence.timeout_s:g} s")

"""Which requests have lost their workers and wait for others to come, and for how long?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kvrelay.coordinator.request_flow import RequestFlow
from kvrelay.errors import KvrelayError

RETRY_INTERVAL_S = 0.5
"""Room comes without a message that says so."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    flow: RequestFlow
    error: KvrelayError
    until_s: float
    """By the event loop's clock."""


class WaitingFlows:
    """Each waits with the error that it fails with when its time is over. A timer runs while there is one."""

    def __init__(
        self,
        retry: Callable[[RequestFlow, KvrelayError], None],
        give_up: Callable[[RequestFlow, KvrelayError], None],
        max_wait_s: float,
    ) -> None:
        """`retry` may `add` the flow again or not: it waits until it is discarded. `give_up` must discard it."""
        self._retry = retry
        self._give_up = give_up
        self._max_wait_s = max_wait_s
        self._waiting: dict[str, _Waiting] = {}
        """By request id."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, flow: RequestFlow, error: KvrelayError) -> None:
        """One that waits already goes on waiting, with its first error and no longer than before."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(flow, error, loop.time() + self._max_wait_s)
        self._waiting.setdefault(flow.request.request_id, waiting)
        if self._timer is None:
            self._timer = loop.call_later(RETRY_INTERVAL_S, self._on_timer)

    def discard(self, flow: RequestFlow) -> None:
        self._waiting.pop(flow.request.request_id, None)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def retry(self) -> None:
        """Somebody may have come for whom they wait."""
        for waiting in list(self._waiting.values()):
            self._retry(waiting.flow, waiting.error)

    def give_up(self) -> None:
        """Nobody will come."""
        for waiting in list(self._waiting.values()):
            self._give_up(waiting.flow, waiting.error)

    def _on_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(RETRY_INTERVAL_S, self._on_timer)
        for waiting in list(self._waiting.values()):
            if waiting.until_s <= loop.time():
                self._give_up(waiting.flow, waiting.error)
        self.retry()

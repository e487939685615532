"""May a call whose coordinator was lost go on with another one, and how? No I/O."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from kvrelay.client.connection import UnreachableError
from kvrelay.errors import KvrelayError
from kvrelay.v1 import inference_pb2

RECONNECT_FOR_S = 30.0
"""A coordinator that is alone takes some seconds to be started again."""
_FIRST_PAUSE_S = 0.05
_MAX_PAUSE_S = 2.0


class Resumption:
    """Of one call. Tokens count once, whatever becomes of coordinators: what has come is told to the next one.

    A call that never reached a coordinator is not tried again, nor one of several completions that has begun.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        reconnect_for_s: float,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`request` is changed as tokens come."""
        self.request = request
        self._reconnect_for_s = reconnect_for_s
        self._clock = clock
        self._ends_s = None if timeout_s is None else clock() + timeout_s
        self._until_s: float | None = None
        """When it gives up, while no coordinator is there."""
        self._pause_s = _FIRST_PAUSE_S

    def took(self, response: inference_pb2.GenerateResponse) -> None:
        """Something has come."""
        self._until_s = None
        self._pause_s = _FIRST_PAUSE_S
        self.request.resume.token_ids.extend(response.token_ids)
        self.request.resume.num_text_chars += len(response.text)

    def pause_s(self, error: KvrelayError) -> float | None:
        """How long to wait before `request` is sent again after this error; None when the call has failed."""
        if not isinstance(error, UnreachableError) or not (self._until_s or error.had_connected):
            return None
        if self.request.sampling.n > 1 and self.request.resume.token_ids:
            return None
        now_s = self._clock()
        if self._until_s is None:
            self._until_s = now_s + self._reconnect_for_s
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311
        self._pause_s = min(_MAX_PAUSE_S, 2 * self._pause_s)
        is_too_late = now_s + pause_s >= min(self._until_s, self._ends_s or self._until_s)
        return None if is_too_late else pause_s

    @property
    def timeout_s(self) -> float | None:
        """What is left for the next attempt."""
        return None if self._ends_s is None else max(0.0, self._ends_s - self._clock())

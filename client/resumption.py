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

    A call that reached none of the coordinators is not tried again.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        reconnect_for_s: float,
        timeout_s: float | None,
        num_coordinators: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`request` is changed as tokens come."""
        self.request = request
        self._reconnect_for_s = reconnect_for_s
        self._clock = clock
        self._ends_s = None if timeout_s is None else clock() + timeout_s
        self._begun: dict[int, inference_pb2.Resume] = {}
        """By index."""
        self._until_s: float | None = None
        """When it gives up, while no coordinator is there."""
        self._pause_s = _FIRST_PAUSE_S
        self._num_untried = num_coordinators - 1
        """Of those who may answer where the first did not."""

    def took(self, response: inference_pb2.GenerateResponse) -> None:
        """Something has come."""
        self._until_s = None
        self._pause_s = _FIRST_PAUSE_S
        resume = self._begun.get(response.index)
        if resume is None:
            resume = self._begun[response.index] = self.request.resume.add(index=response.index)
        resume.token_ids.extend(response.token_ids)
        resume.num_text_chars += len(response.text)
        resume.is_finished = bool(response.finish_reason)

    @property
    def is_complete(self) -> bool:
        """Whether all has come, so that nothing is lost with the call."""
        num_finished = sum(resume.is_finished for resume in self._begun.values())
        return num_finished == max(1, self.request.sampling.n)

    def pause_s(self, error: KvrelayError) -> float | None:
        """How long to wait before `request` is sent again after this error; None when the call has failed."""
        if not isinstance(error, UnreachableError):
            return None
        if self._until_s is None and not error.had_connected:
            self._num_untried -= 1
            return 0.0 if self._num_untried >= 0 else None
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

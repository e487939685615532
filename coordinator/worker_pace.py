"""How long does a worker take for what it has, beside what its own fit says?"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvrelay.coordinator.breaker import Breaker
from kvrelay.coordinator.scheduler.view import WorkerView

_MAX_STEP_TOKENS = 2048
"""So much of a prompt may be computed between two tokens of a sequence."""


class WorkerPace:
    """Of one connection to one worker; tells its breaker. No I/O.

    A prompt is expected after all that was queued before it; a sequence gets its next token with the next step. Nothing
    is expected of a worker that has measured nothing yet.
    """

    def __init__(self, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self._breaker = breaker
        self._clock = clock
        self._prompts: dict[str, tuple[float, float]] = {}
        """When each was sent and how long it should take, the oldest first."""
        self._decoding: set[str] = set()
        self._stepped_s = 0.0
        self._step_expected_s = 0.0

    def sent_prompt(self, request_id: str, view: WorkerView) -> None:
        """The worker is to compute it after what else `view` says, which counts the prompt already."""
        if view.times.num_prefills:
            expected_s = view.times.prefill_s(view.num_queued_prompt_tokens)
            self._prompts[request_id] = self._clock(), expected_s

    def ended_prompt(self, request_id: str, *, done: bool) -> None:
        """It is `done`, or nobody waits for it any more."""
        sent = self._prompts.pop(request_id, None)
        if sent is not None and done:
            self._breaker.took(self._clock() - sent[0], sent[1])

    def stepped(self, decoding: set[str], ended: set[str], view: WorkerView) -> None:
        """Tokens have come, for sequences that go on and for some that do not."""
        now_s = self._clock()
        if self._decoding and view.times.num_steps:
            self._breaker.took(now_s - self._stepped_s, self._step_expected_s)
        self._decoding |= decoding
        self._decoding -= ended
        self._stepped_s = now_s
        self._step_expected_s = _step_s(view)

    def ended_sequence(self, request_id: str) -> None:
        """Nobody waits for its tokens any more."""
        self._decoding.discard(request_id)

    def is_overdue(self) -> bool:
        """Whether what should have come long ago has not come yet."""
        now_s = self._clock()
        oldest = next(iter(self._prompts.values()), None)
        if oldest is not None and self._breaker.is_slow(now_s - oldest[0], oldest[1]):
            return True
        is_awaited = self._decoding and self._step_expected_s
        return bool(is_awaited) and self._breaker.is_slow(now_s - self._stepped_s, self._step_expected_s)


def _step_s(view: WorkerView) -> float:
    """0 when it is not known: nothing is late then."""
    if not view.times.num_steps:
        return 0.0
    step_s = view.times.step_s(view.num_running_requests, view.num_context_tokens)
    return step_s + view.times.prefill_s(min(view.num_queued_prompt_tokens, _MAX_STEP_TOKENS))

"""What does a coordinator count of its requests? Plain numbers, owned by one event loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum

from kvrelay.coordinator.metrics.histogram import Histogram
from kvrelay.errors import InvalidRequestError, KvrelayError, NoWorkersError, OverloadedError
from kvrelay.v1 import common_pb2, worker_pb2

_TTFT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_E2E_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SCHEDULE_S = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)
_BROKEN = (common_pb2.FINISH_REASON_ABORT, common_pb2.FINISH_REASON_ERROR)
_REASONS: dict[type[KvrelayError], str] = {
    InvalidRequestError: "invalid",
    OverloadedError: "overloaded",
    NoWorkersError: "no_workers",
}


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    """All that was asked for has been generated."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Its client went, or had enough."""
    REFUSED = "refused"
    """It never got to a worker."""


class _Request:
    __slots__ = ("arrived_s", "completion_ids", "has_failed", "has_tokens")

    def __init__(self, completion_ids: Collection[str], arrived_s: float) -> None:
        self.completion_ids = completion_ids
        self.arrived_s = arrived_s
        self.has_tokens = False
        self.has_failed = False


class _Completion:
    __slots__ = ("is_complete", "last_s", "request")

    def __init__(self, request: _Request) -> None:
        self.request = request
        self.is_complete = False
        self.last_s: float | None = None
        """When its latest tokens came."""


class RequestMetrics:
    """Totals since the process began, and the requests in flight. `clock` is in seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._completions: dict[str, _Completion] = {}
        self.ttft_s = Histogram(_TTFT_S)
        self.itl_s = Histogram(_ITL_S)
        self.e2e_s = Histogram(_E2E_S)
        self.schedule_s = Histogram(_SCHEDULE_S)
        self.num_by_outcome: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
        self.num_refused: Counter[str] = Counter(dict.fromkeys(_REASONS.values(), 0))
        """By reason."""
        self.num_decided: Counter[tuple[str, str]] = Counter()
        """By policy and kind."""
        self.num_replanned = 0
        """Plans that followed on a lost one."""
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        """Of the prompts' tokens, those whose KV was not computed for the request."""
        self.num_generated_tokens = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._requests)

    def refused(self, error: KvrelayError) -> None:
        """A request ended before a worker got it."""
        kind = next((kind for kind in _REASONS if isinstance(error, kind)), None)
        if kind is None:
            self.num_by_outcome[Outcome.FAILED.value] += 1
        else:
            self.num_by_outcome[Outcome.REFUSED.value] += 1
            self.num_refused[_REASONS[kind]] += 1

    def decided(self, policy: str, kind: str, seconds: float) -> None:
        """The scheduler chose workers for a request."""
        self.num_decided[policy, kind] += 1
        self.schedule_s.observe(seconds)

    def started(
        self, request_id: str, completion_ids: Collection[str], *, arrived_s: float, num_prompt_tokens: int
    ) -> None:
        """Workers have it; `finished` follows, whichever way it ends."""
        self.num_prompt_tokens += num_prompt_tokens
        request = self._requests[request_id] = _Request(completion_ids, arrived_s)
        for completion_id in completion_ids:
            self._completions[completion_id] = _Completion(request)

    def take(self, deltas: Iterable[worker_pb2.TokenDelta]) -> None:
        """The tokens of one message, as clients get them. Gaps are between messages with tokens of a completion."""
        now_s = self._clock()
        completions = self._completions
        for delta in deltas:
            completion = completions.get(delta.request_id)
            if completion is None:
                continue
            if num_tokens := len(delta.token_ids):
                self.num_generated_tokens += num_tokens
                if completion.last_s is None:
                    self._begin(completion.request, delta, now_s)
                else:
                    self.itl_s.observe(now_s - completion.last_s)
                completion.last_s = now_s
            if delta.finish_reason:
                completion.is_complete = True
                completion.request.has_failed |= delta.finish_reason in _BROKEN

    def stopped(self, completion_ids: Iterable[str]) -> None:
        """A stop string has ended them, so they have all that was asked for."""
        for completion_id in completion_ids:
            if completion := self._completions.get(completion_id):
                completion.is_complete = True

    def failed(self, completion_ids: Iterable[str]) -> None:
        for completion_id in completion_ids:
            if completion := self._completions.get(completion_id):
                completion.request.has_failed = True

    def finished(self, request_id: str) -> None:
        """The request is over; one that never started is ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        completions = [self._completions.pop(completion_id) for completion_id in request.completion_ids]
        if request.has_failed:
            outcome = Outcome.FAILED
        elif all(completion.is_complete for completion in completions):
            outcome = Outcome.OK
            self.e2e_s.observe(self._clock() - request.arrived_s)
        else:
            outcome = Outcome.CANCELLED
        self.num_by_outcome[outcome.value] += 1

    def _begin(self, request: _Request, delta: worker_pb2.TokenDelta, now_s: float) -> None:
        """The first tokens of a completion; of several completions the first one tells of the request."""
        if not request.has_tokens:
            request.has_tokens = True
            self.ttft_s.observe(now_s - request.arrived_s)
            self.num_cached_tokens += delta.num_cached_tokens

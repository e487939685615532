"""How do requests come to the dispatcher: at once while workers have room, and else when it is their turn?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvrelay.coordinator.admission.capacity import Capacity
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.admission.queue import AdmissionQueue, Offer
from kvrelay.coordinator.admission.ticket import Ticket
from kvrelay.coordinator.flow_request import FlowRequest
from kvrelay.coordinator.request_terms import RequestTerms
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.errors import KvrelayError, NoWorkersError, OverloadedError

_INTERVAL_S = 0.005
"""So often is looked for room while requests wait; workers have more to do than that."""
_MAX_RELEASES = 32
"""At a time: the event loop has other work."""
_LEAST_TARGET_S = 0.001


class Starter(Protocol):
    """See `Dispatcher`."""

    def submit(self, request: FlowRequest, timeline: RequestTimeline, trace: RequestTrace) -> None: ...

    def cancel(self, completion_ids: Sequence[str]) -> None: ...


Refuse = Callable[[Sequence[str], KvrelayError], None]
"""Of completions that waited and cannot be started."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: FlowRequest
    timeline: RequestTimeline
    trace: RequestTrace
    open_ids: set[str]
    """Completions that somebody still waits for."""


class Admitting:
    """Stands before a dispatcher and takes the same calls. No task of its own: a timer runs while something waits."""

    def __init__(
        self,
        dispatcher: Starter,
        refuse: Refuse,
        config: AdmissionConfig,
        capacity: Capacity,
        *,
        wait_for_workers_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wait_for_workers_s`: for how long requests that wait go on waiting while no worker is there."""
        self.queue = AdmissionQueue(config, capacity)
        self._capacity = capacity
        self._wait_for_workers_s = wait_for_workers_s
        self._deserted_at_s: float | None = None
        self._dispatcher = dispatcher
        self._refuse = refuse
        self._expected_output_tokens = config.expected_output_tokens
        self._clock = clock
        self._waiting: dict[Ticket, _Waiting] = {}
        self._tickets: dict[str, Ticket] = {}
        """By completion."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def oldest_s(self) -> float:
        """For how long the one has waited that has waited longest."""
        return self.queue.oldest_s(self._clock())

    def check(self, terms: RequestTerms) -> None:
        """Raises the `OverloadedError` that `submit` would raise now for the shortest request on these terms."""
        self.queue.check(_ticket(terms, num_tokens=1), self._clock())

    def submit(self, request: FlowRequest, timeline: RequestTimeline, trace: RequestTrace) -> None:
        """Start a request, now or when it is its turn.

        Raises what the dispatcher raises, and `OverloadedError`; then nothing of it is left. When a request that waits
        cannot be started, `refuse` is told.
        """
        ticket = _ticket(request.terms, num_tokens=self._num_tokens(request), priority=request.priority)
        if self.queue.offer(ticket, self._clock()) is Offer.ADMITTED:
            self._dispatcher.submit(request, timeline, trace)
            return
        timeline.mark("admission.queued")
        trace.begin("queue", {"request.class": request.terms.request_class.name, "tenant": request.terms.tenant})
        completion_ids = {completion.request_id for completion in request.completions}
        if not self._waiting:
            self._deserted_at_s = None
        self._waiting[ticket] = _Waiting(request, timeline, trace, completion_ids)
        self._tickets.update(dict.fromkeys(completion_ids, ticket))
        self._set_timer()

    def cancel(self, completion_ids: Sequence[str]) -> None:
        """Nobody waits for these any more; what is unknown or over is ignored."""
        for completion_id in completion_ids:
            ticket = self._tickets.pop(completion_id, None)
            if ticket is None:
                continue
            waiting = self._waiting[ticket]
            waiting.open_ids.discard(completion_id)
            if not waiting.open_ids:
                self.queue.remove(ticket, self._clock())
                self._forget(ticket, "cancelled")
        self._dispatcher.cancel(completion_ids)

    def release(self) -> None:
        """Start those whose turn it is while there is room, and refuse those that have waited too long."""
        now_s = self._clock()
        for late in self.queue.take_overdue(now_s):
            self._fail(late, OverloadedError(f"no worker had room within the {late.ttft_s:g} s of ttft_s; try later"))
        if not self._has_workers(now_s):
            return
        num_left = _MAX_RELEASES
        while num_left and (ticket := self.queue.next_ready(now_s)):
            self._start(ticket, now_s)
            num_left -= 1

    def give_up(self) -> None:
        """Refuse all that wait: nobody will come for them."""
        for ticket in list(self._waiting):
            self.queue.remove(ticket, self._clock())
            self._fail(ticket, NoWorkersError("no decode worker came back in time; try again later"))

    def _has_workers(self, now_s: float) -> bool:
        if self._capacity.has_workers():
            self._deserted_at_s = None
            return True
        if self._deserted_at_s is None:
            self._deserted_at_s = now_s
        if now_s >= self._deserted_at_s + self._wait_for_workers_s:
            self.give_up()
        return False

    def _start(self, ticket: Ticket, now_s: float) -> None:
        waiting = self._waiting[ticket]
        request, terms = waiting.request, waiting.request.terms
        waiting.timeline.mark("admission.released")
        waiting.trace.end("queue")
        if terms.ttft_s is not None and ticket.queued_at_s is not None:
            left_s = max(_LEAST_TARGET_S, terms.ttft_s - (now_s - ticket.queued_at_s))
            request = replace(request, terms=replace(terms, ttft_s=left_s))
        try:
            self._dispatcher.submit(request, waiting.timeline, waiting.trace)
        except KvrelayError as error:
            self._fail(ticket, error)
            return
        gone = [one.request_id for one in request.completions if one.request_id not in waiting.open_ids]
        self._forget(ticket)
        self._dispatcher.cancel(gone)

    def _fail(self, ticket: Ticket, error: KvrelayError) -> None:
        waiting = self._waiting[ticket]
        self._forget(ticket, error.message)
        waiting.trace.close(error.message)
        self._refuse(sorted(waiting.open_ids), error)

    def _forget(self, ticket: Ticket, reason: str = "") -> None:
        waiting = self._waiting.pop(ticket)
        waiting.trace.end("queue", reason)
        for completion_id in waiting.open_ids:
            del self._tickets[completion_id]

    def _set_timer(self) -> None:
        if self._timer is None and self._waiting:
            self._timer = asyncio.get_running_loop().call_later(_INTERVAL_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self.release()
        finally:
            self._set_timer()

    def _num_tokens(self, request: FlowRequest) -> int:
        expected = self._expected_output_tokens
        num_output_tokens = sum(min(one.sampling.max_tokens or expected, expected) for one in request.completions)
        return len(request.prompt_token_ids) + num_output_tokens


def _ticket(terms: RequestTerms, *, num_tokens: int, priority: int = 0) -> Ticket:
    return Ticket(
        num_tokens=num_tokens,
        tenant=terms.tenant,
        request_class=terms.request_class,
        priority=priority,
        ttft_s=terms.ttft_s,
    )

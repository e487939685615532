"""Where do requests wait in a simulated coordinator? In the queue that real ones have, until a worker has room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrelay.coordinator.admission.capacity import Capacity
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.admission.queue import AdmissionQueue, Offer
from kvrelay.coordinator.admission.ticket import Ticket
from kvrelay.errors import OverloadedError
from kvrelay.simulator.events import EventLoop
from kvrelay.workload.trace import TraceRequest

_INTERVAL_S = 0.005
"""After which a coordinator looks for room again; a simulated one only when something has changed."""
_LEAST_TARGET_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionCalls:
    """What happens to requests."""

    start: Callable[[TraceRequest, float | None], None]
    """Given what is left of its time to first token."""
    refuse: Callable[[TraceRequest, OverloadedError], None]
    waiting: Callable[[int], None]
    """Given by how much the number of those that wait has changed."""


class SimulatedAdmission:
    """Does under virtual time what `kvrelay.coordinator.admitting.Admitting` does; all requests are of one tenant."""

    def __init__(self, loop: EventLoop, capacity: Capacity, config: AdmissionConfig, calls: AdmissionCalls) -> None:
        self._loop = loop
        self._queue = AdmissionQueue(config, capacity)
        self._expected_output_tokens = config.expected_output_tokens
        self._calls = calls
        self._waiting: dict[Ticket, TraceRequest] = {}
        self._is_due = False

    def submit(self, request: TraceRequest, ttft_s: float | None) -> None:
        """Start a request, now or when it is its turn, or refuse it."""
        num_output_tokens = min(request.num_output_tokens, self._expected_output_tokens)
        ticket = Ticket(num_tokens=request.num_prompt_tokens + num_output_tokens, ttft_s=ttft_s)
        try:
            offer = self._queue.offer(ticket, self._loop.now_s)
        except OverloadedError as error:
            self._calls.refuse(request, error)
            return
        if offer is Offer.ADMITTED:
            self._calls.start(request, ttft_s)
        else:
            self._waiting[ticket] = request
            self._calls.waiting(1)

    def changed(self) -> None:
        """What is known of a worker has changed: look for room, soon."""
        if self._waiting and not self._is_due:
            self._is_due = True
            self._loop.after(_INTERVAL_S, self._release)

    def _release(self) -> None:
        self._is_due = False
        now_s = self._loop.now_s
        for late in self._queue.take_overdue(now_s):
            self._calls.refuse(self._take(late), OverloadedError("no worker had room in time"))
        while ticket := self._queue.next_ready(now_s):
            left_s = None
            if ticket.ttft_s is not None and ticket.queued_at_s is not None:
                left_s = max(_LEAST_TARGET_S, ticket.ttft_s - (now_s - ticket.queued_at_s))
            self._calls.start(self._take(ticket), left_s)

    def _take(self, ticket: Ticket) -> TraceRequest:
        self._calls.waiting(-1)
        return self._waiting.pop(ticket)

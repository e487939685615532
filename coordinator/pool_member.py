"""What does a pool know of one of its workers?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvrelay.coordinator.breaker import Breaker
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.coordinator.worker_link import WorkerLink
from kvrelay.coordinator.worker_load import WorkerLoad
from kvrelay.coordinator.worker_pace import WorkerPace
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2

_WHOLE = (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH)
"""How a sequence ends that got what it was to get."""


class PoolMember:
    """Its link with its record, the view of it that the scheduler reads, and what it has been given."""

    def __init__(self, link: WorkerLink, task: asyncio.Task[None], view: WorkerView, breaker: Breaker) -> None:
        self.link = link
        self.task = task
        self.view = view
        self.prefills: set[str] = set()
        self.load = WorkerLoad()
        self.departed = False
        """Its record is gone; it finishes what it has."""
        self.status = worker_pb2.WorkerStatus()
        self.breaker = breaker
        self.pace = WorkerPace(breaker)

        self._hand_over: asyncio.TimerHandle | None = None

    def hand_over_after(self, delay_s: float, hand_over: Callable[[], None]) -> None:
        """Call it then, unless the member is closed before."""
        self._hand_over = asyncio.get_running_loop().call_later(delay_s, hand_over)

    def close(self) -> None:
        """Disconnect."""
        self.task.cancel()
        if self._hand_over is not None:
            self._hand_over.cancel()

    @property
    def is_busy(self) -> bool:
        return bool(self.prefills or self.load.has_sequences)

    @property
    def is_done(self) -> bool:
        """Whether it is to get nothing new and has nothing more to do."""
        return (self.departed or self.view.draining) and not self.is_busy

    def note_step(self, step: worker_pb2.StepOutputs) -> None:
        """Tokens have come."""
        ended = {delta.request_id for delta in step.deltas if delta.finish_reason}
        going_on = {delta.request_id for delta in step.deltas if not delta.finish_reason}
        self.pace.stepped(going_on, ended, self.view)
        if any(delta.finish_reason in _WHOLE for delta in step.deltas):
            self.breaker.succeeded()

    def is_same_process(self, worker: cluster_pb2.WorkerInfo) -> bool:
        known = self.link.worker
        return (known.incarnation, known.address) == (worker.incarnation, worker.address)

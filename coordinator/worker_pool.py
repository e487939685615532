"""All workers of the cluster that this coordinator is connected to, with their load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Protocol

import structlog

from kvrelay.coordinator.breaker import Breaker, BreakerConfig
from kvrelay.coordinator.metrics.sources import WorkerReport
from kvrelay.coordinator.pool_member import PoolMember
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.coordinator.worker_link import WorkerLink
from kvrelay.coordinator.worker_pace import WorkerPace
from kvrelay.coordinator.worker_view import drain_s_of, take_speeds, view_of
from kvrelay.errors import WorkerLostError
from kvrelay.heartbeat import BUSY_BYTES_PER_S, DEFAULT_HEARTBEAT, HeartbeatConfig
from kvrelay.v1 import cluster_pb2, worker_pb2

_log = structlog.get_logger(__name__)

HAND_OVER_AT = 0.75
"""Of the time that a worker drains: what it has then would be lost with it, perhaps."""


class PoolListener(Protocol):
    """Who hears what workers say. Called in the event loop; must not block."""

    def on_step(self, worker_id: str, step: worker_pb2.StepOutputs) -> None: ...

    def on_request_failed(self, worker_id: str, failed: worker_pb2.RequestFailed) -> None: ...

    def on_worker_lost(self, worker_id: str, reason: str) -> None: ...

    def on_worker_leaving(self, worker_id: str) -> None:
        """It drains, and its requests will not be done in time."""

    def on_workers_changed(self) -> None:
        """A worker connected, left, or changed its record."""

    def on_closed(self) -> None:
        """No worker is there any more, and none will come."""


class WorkerPool:
    """Follows membership by `join`, `update` and `leave`; open it with `running()`.

    All methods belong to the event loop, and none but `tried` waits.
    """

    def __init__(
        self,
        coordinator_id: str,
        *,
        max_queued_messages: int = 4096,
        breaker: BreakerConfig | None = None,
        heartbeat: HeartbeatConfig = DEFAULT_HEARTBEAT,
    ) -> None:
        self._coordinator_id = coordinator_id
        self._breaker_config = breaker
        self._max_queued_messages = max_queued_messages
        self._heartbeat = heartbeat
        self._members: dict[str, PoolMember] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._listener: PoolListener | None = None

    @contextlib.asynccontextmanager
    async def running(self, listener: PoolListener) -> AsyncIterator[None]:
        """Links live inside this context; leaving it closes every stream, so workers cancel what is left."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks, self._listener = tasks, listener
            try:
                yield
            finally:
                self._tasks = None
                for member in list(self._members.values()):
                    self._cut(member)
                listener.on_closed()

    def join(self, worker: cluster_pb2.WorkerInfo) -> None:
        """Connect to a worker; a restarted one takes its predecessor's place, one that came back its own.

        One that drains is not connected.
        """
        if self._tasks is None:
            raise RuntimeError("the worker pool is not running")
        if member := self._members.get(worker.worker_id):
            if member.is_same_process(worker):
                self.update(worker)
                return
            self._cut(member)
        if worker.state == cluster_pb2.WORKER_STATE_DRAINING:
            return
        link = WorkerLink(worker, self._coordinator_id, self, self._max_queued_messages, self._heartbeat)
        task = self._tasks.create_task(link.run(), name=f"link to {worker.worker_id}")
        self._members[worker.worker_id] = PoolMember(link, task, view_of(worker), Breaker(self._breaker_config))
        _log.info("worker joined", worker_id=worker.worker_id, address=worker.address)

    def update(self, worker: cluster_pb2.WorkerInfo) -> None:
        """Take a changed record; a new process or address means a new connection.

        A worker that drains gets nothing new, and is disconnected once it has finished what it has.
        """
        member = self._members.get(worker.worker_id)
        if member is None or not member.is_same_process(worker):
            self.join(worker)
            return
        member.departed = False
        member.link.worker = worker
        fresh = view_of(worker)
        fresh.num_assigned = member.view.num_assigned
        take_speeds(fresh, member.status)
        member.load.fill(fresh)
        if fresh.draining and not member.view.draining:
            member.hand_over_after(drain_s_of(worker) * HAND_OVER_AT, partial(self._hand_over, member))
        member.view = fresh
        self._retire(member)
        self._notify_changed()

    def leave(self, worker_id: str) -> None:
        """Give nothing new to a worker whose record is gone, and disconnect once it has finished what it has.

        Unknown ids are ignored.
        """
        if member := self._members.get(worker_id):
            _log.info("worker left", worker_id=worker_id)
            member.departed = True
            self._retire(member)
            self._notify_changed()

    async def tried(self) -> None:
        """Wait until each worker that has joined is connected, or could not be."""
        for member in list(self._members.values()):
            await member.link.tried.wait()

    def views(self) -> Sequence[WorkerView]:
        """The connected workers that take requests. The views are live: read them at once."""
        members = self._present()
        for member in members:
            member.view.avoided = not member.breaker.allows() or member.pace.is_overdue()
        return [member.view for member in members]

    def reports(self) -> list[WorkerReport]:
        """The same, with the gauges that each worker sent last."""
        self.views()
        return [WorkerReport(view=member.view, status=member.status) for member in self._present()]

    def workers(self) -> list[cluster_pb2.WorkerInfo]:
        """The records of those workers."""
        return [member.link.worker for member in self._present()]

    def assign_prefill(self, worker_id: str, message: worker_pb2.Prefill, num_tokens: int) -> None:
        """Send a prompt; the tokens of it that are to be computed count until `end_prefill`, and it is at work until
        `release_prefill`.

        Raises like `WorkerLink.send`.
        """
        member = self._member(worker_id)
        member.link.send(worker_pb2.CoordinatorMessage(prefill=message))
        member.breaker.sent()
        member.prefills.add(message.request_id)
        member.view.num_assigned += 1
        self.queue_prompt(worker_id, message.request_id, num_tokens)

    def queue_prompt(self, worker_id: str, request_id: str, num_tokens: int) -> None:
        """Count what the worker is to compute of a prompt, with its decode or before, until `end_prefill`."""
        member = self._member(worker_id)
        member.load.add_prompt(request_id, num_tokens)
        member.load.fill(member.view)
        member.pace.sent_prompt(request_id, member.view)

    def end_prefill(self, worker_id: str, request_id: str, *, done: bool = True) -> None:
        """The first token is there, or nobody waits for it; the worker may still push."""
        member = self._members.get(worker_id)
        if member and member.load.remove_prompt(request_id):
            member.load.fill(member.view)
            member.pace.ended_prompt(request_id, done=done)

    def release_prefill(self, worker_id: str, request_id: str) -> None:
        """The worker has nothing more to do for the prompt."""
        self.end_prefill(worker_id, request_id, done=False)
        if member := self._members.get(worker_id):
            member.prefills.discard(request_id)
            self._retire(member)

    def reserve_sequences(self, worker_id: str, request_id: str, num_sequences: int, num_tokens: int = 0) -> None:
        """Count sequences with so much context in all that the worker has or will get, until `release_sequences`."""
        member = self._member(worker_id)
        member.breaker.sent()
        member.load.add_sequences(request_id, num_sequences, num_tokens)
        member.view.num_assigned += 1
        member.load.fill(member.view)

    def release_sequences(self, worker_id: str, request_id: str) -> None:
        """They are over, and so is a prompt that the worker was to compute itself."""
        self.end_prefill(worker_id, request_id, done=False)
        member = self._members.get(worker_id)
        if member and member.load.remove_sequences(request_id):
            member.load.fill(member.view)
            self._retire(member)

    def send_decodes(self, worker_id: str, request_id: str, messages: Sequence[worker_pb2.Decode]) -> None:
        """The sequences of a request, of which the worker knows from now on. Raises like `WorkerLink.send`."""
        member = self._member(worker_id)
        for message in messages:
            member.link.send(worker_pb2.CoordinatorMessage(decode=message))
        member.load.sent_sequences(request_id)

    def send_cancel(self, worker_id: str, request_id: str) -> None:
        """Never fails: a worker that is gone has cancelled already."""
        if member := self._members.get(worker_id):
            member.pace.ended_sequence(request_id)
            cancel = worker_pb2.Cancel(request_id=request_id)
            member.link.send(worker_pb2.CoordinatorMessage(cancel=cancel))

    def send_kv_lost(self, worker_id: str, request_id: str) -> None:
        """Never fails, like `send_cancel`."""
        if member := self._members.get(worker_id):
            lost = worker_pb2.KvLost(request_id=request_id)
            member.link.send(worker_pb2.CoordinatorMessage(kv_lost=lost))

    def on_connected(self, link: WorkerLink) -> None:
        _log.info("worker connected", worker_id=link.worker.worker_id)
        self._notify_changed()

    def on_step(self, link: WorkerLink, step: worker_pb2.StepOutputs) -> None:
        if member := self._members.get(link.worker.worker_id):
            member.note_step(step)
        if self._listener:
            self._listener.on_step(link.worker.worker_id, step)

    def on_request_failed(self, link: WorkerLink, failed: worker_pb2.RequestFailed) -> None:
        member = self._members.get(link.worker.worker_id)
        if member and failed.reason != worker_pb2.RequestFailed.REASON_INVALID:
            member.breaker.failed()
        if self._listener:
            self._listener.on_request_failed(link.worker.worker_id, failed)

    def on_status(self, link: WorkerLink, status: worker_pb2.WorkerStatus) -> None:
        if member := self._members.get(link.worker.worker_id):
            member.status = status
            take_speeds(member.view, status)
            member.load.report(status)
            member.load.fill(member.view)

    def on_announced(self, num_bytes: int) -> None:
        for member in self._members.values():
            member.link.excuse(1000 * num_bytes // BUSY_BYTES_PER_S)

    def on_lost(self, link: WorkerLink, reason: str) -> None:
        member = self._members.get(link.worker.worker_id)
        if member is None or member.link is not link:
            return
        member.status = worker_pb2.WorkerStatus()
        member.load.report(member.status)
        member.pace = WorkerPace(member.breaker)
        if member.is_busy:
            member.breaker.failed()
        self._lost(link.worker.worker_id, reason)
        self._notify_changed()

    def _present(self) -> list[PoolMember]:
        if self._tasks is None:
            return []
        return [member for member in self._members.values() if member.link.connected and not member.departed]

    def _hand_over(self, member: PoolMember) -> None:
        """What it still has then goes on elsewhere while it can still be asked for KV blocks."""
        if self._listener and member.is_busy:
            self._listener.on_worker_leaving(member.link.worker.worker_id)

    def _retire(self, member: PoolMember) -> None:
        """Disconnect from a worker that leaves and has nothing to do: it waits for that."""
        if member.is_done:
            self._members.pop(member.link.worker.worker_id, None)
            member.close()

    def _cut(self, member: PoolMember) -> None:
        """Disconnect at once; what the worker had is lost."""
        worker_id = member.link.worker.worker_id
        self._members.pop(worker_id, None)
        member.close()
        if member.link.connected:
            self._lost(worker_id, "the worker has left the cluster")

    def _lost(self, worker_id: str, reason: str) -> None:
        _log.warning("worker lost", worker_id=worker_id, reason=reason)
        if self._listener:
            self._listener.on_worker_lost(worker_id, reason)

    def _notify_changed(self) -> None:
        if self._listener:
            self._listener.on_workers_changed()

    def _member(self, worker_id: str) -> PoolMember:
        try:
            return self._members[worker_id]
        except KeyError:
            raise WorkerLostError(f"worker {worker_id} has left the cluster") from None

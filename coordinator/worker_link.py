"""One coordinator's stream to one worker: connects, reconnects, carries messages both ways."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any, Protocol, TypeAlias, cast

import grpc
import grpc.aio
import structlog

from kvrelay.cancellation import raise_if_cancelled
from kvrelay.errors import OverloadedError, WorkerLostError, first_leaf
from kvrelay.grpc_options import open_channel
from kvrelay.heartbeat import DEFAULT_HEARTBEAT, HeartbeatConfig, Silence, SilentError, until_silent
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

_Stream: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.CoordinatorMessage, worker_pb2.WorkerMessage]"

_log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 5.0
BACKOFF_INITIAL_S = 0.1
BACKOFF_MAX_S = 3.0


class WrongWorkerError(Exception):
    """Something else answers at the worker's address, or what it says makes no sense."""


class LinkEvents(Protocol):
    """Who hears of a link. Called in the event loop; must not block."""

    def on_connected(self, link: WorkerLink) -> None: ...

    def on_step(self, link: WorkerLink, step: worker_pb2.StepOutputs) -> None: ...

    def on_request_failed(self, link: WorkerLink, failed: worker_pb2.RequestFailed) -> None: ...

    def on_status(self, link: WorkerLink, status: worker_pb2.WorkerStatus) -> None: ...

    def on_announced(self, num_bytes: int) -> None:
        """A large message comes, over whichever link."""

    def on_lost(self, link: WorkerLink, reason: str) -> None:
        """The stream broke, or the worker says nothing: it cancels all that came over it, at once or once it can."""


class WorkerLink:
    """`run()` keeps one Session stream open until it is cancelled; `send()` never waits."""

    def __init__(
        self,
        worker: cluster_pb2.WorkerInfo,
        coordinator_id: str,
        events: LinkEvents,
        max_queued_messages: int,
        heartbeat: HeartbeatConfig = DEFAULT_HEARTBEAT,
    ) -> None:
        self.worker = worker
        self.connected = False
        self.tried = asyncio.Event()
        """Set once it has been connected, or could not be."""
        self._coordinator_id = coordinator_id
        self._events = events
        self._max_queued_messages = max_queued_messages
        self._heartbeat = heartbeat
        self._outbox: deque[worker_pb2.CoordinatorMessage] = deque()
        self._outbox_filled = asyncio.Event()

    def send(self, message: worker_pb2.CoordinatorMessage) -> None:
        """Queue a message; what ends a request or its waiting is always taken, it is as little as the requests before.

        Raises `WorkerLostError` when there is no stream and `OverloadedError` when the queue is full.
        Without a stream an end is needless and dropped.
        """
        is_end = message.WhichOneof("message") in ("cancel", "kv_lost")
        if not self.connected:
            if is_end:
                return
            raise WorkerLostError(f"worker {self.worker.worker_id} at {self.worker.address} is not connected")
        if not is_end and len(self._outbox) >= self._max_queued_messages:
            raise OverloadedError(
                f"{len(self._outbox)} messages wait to be sent to worker {self.worker.worker_id}; try again later"
            )
        self._outbox.append(message)
        self._outbox_filled.set()

    def excuse(self, busy_ms: int) -> None:
        """Tell the worker that nothing may be heard for so long: this event loop will be busy."""
        if self.connected:
            beat = worker_pb2.Heartbeat(busy_ms=busy_ms)
            self._outbox.appendleft(worker_pb2.CoordinatorMessage(heartbeat=beat))
            self._outbox_filled.set()

    async def run(self) -> None:
        """Connect again and again, with growing pauses, until cancelled."""
        pause_s = BACKOFF_INITIAL_S
        try:
            while True:
                reason = await self._run_session()
                raise_if_cancelled()
                if self.connected:
                    pause_s = BACKOFF_INITIAL_S
                self._disconnected(reason)
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)
        finally:
            self._disconnected("the worker has left the cluster")

    async def _run_session(self) -> str:
        """One stream from hello to its end, whose reason is returned."""
        reason = "the worker closed the stream"
        try:
            async with open_channel(self.worker.address) as channel:
                await self._converse(worker_pb2_grpc.WorkerStub(channel))
        except* grpc.aio.AioRpcError as group:
            reason = _describe(first_leaf(group))
        except* TimeoutError:
            reason = f"no hello within {HELLO_TIMEOUT_S:g} s"
        except* (WrongWorkerError, SilentError) as group:
            reason = str(first_leaf(group))
        return reason

    async def _converse(self, stub: worker_pb2_grpc.WorkerStub) -> None:
        stream = cast("_Stream", cast("Any", stub).Session())
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await self._shake_hands(stream)
            self.connected = True
            self.tried.set()
            self._events.on_connected(self)
            silence = self._heartbeat.silence_of(hello.heartbeat_ms)
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(self._write(stream), name=f"write to {self.worker.worker_id}"),
                    tasks.create_task(self._beat(), name=f"heartbeats to {self.worker.worker_id}"),
                ]
                if silence is not None:
                    who = f"worker {self.worker.worker_id}"
                    loops.append(tasks.create_task(until_silent(silence, who), name=f"silence of {who}"))
                await self._read(stream, silence)
                for loop in loops:
                    loop.cancel()
        finally:
            stream.cancel()

    async def _shake_hands(self, stream: _Stream) -> worker_pb2.WorkerHello:
        hello = worker_pb2.CoordinatorHello(
            coordinator_id=self._coordinator_id, heartbeat_ms=self._heartbeat.interval_ms
        )
        await stream.write(worker_pb2.CoordinatorMessage(hello=hello))
        message = await stream.read()
        if not isinstance(message, worker_pb2.WorkerMessage) or message.WhichOneof("message") != "hello":
            raise WrongWorkerError(f"{self.worker.address} did not say hello")
        if message.hello.worker.worker_id != self.worker.worker_id:
            raise WrongWorkerError(
                f"{self.worker.address} is worker {message.hello.worker.worker_id}, not {self.worker.worker_id}"
            )
        return message.hello

    async def _beat(self) -> None:
        """Whatever waits to be sent is as good as a heartbeat."""
        beat = worker_pb2.CoordinatorMessage(heartbeat=worker_pb2.Heartbeat())
        while True:
            if not self._outbox:
                self._outbox.append(beat)
                self._outbox_filled.set()
            await asyncio.sleep(self._heartbeat.interval_s)

    async def _write(self, stream: _Stream) -> None:
        """Send what is queued, in order; an ended stream is the reader's to report."""
        try:
            while True:
                await self._outbox_filled.wait()
                self._outbox_filled.clear()
                while self._outbox:
                    await stream.write(self._outbox.popleft())
        except asyncio.InvalidStateError:
            _log.debug("stream ended while writing", worker_id=self.worker.worker_id)

    async def _read(self, stream: _Stream, silence: Silence | None) -> None:
        while isinstance(message := await stream.read(), worker_pb2.WorkerMessage):
            if silence is not None:
                silence.heard(message.heartbeat.next_message_bytes, message.heartbeat.busy_ms)
            try:
                self._hand_on(message)
            except Exception as error:  # The boundary: what one worker says must not end the others' links.
                _log.exception("message not understood", worker_id=self.worker.worker_id)
                raise WrongWorkerError(f"what it said could not be taken in: {error}") from error

    def _hand_on(self, message: worker_pb2.WorkerMessage) -> None:
        match message.WhichOneof("message"):
            case "step":
                self._events.on_step(self, message.step)
            case "failed":
                self._events.on_request_failed(self, message.failed)
            case "status":
                self._events.on_status(self, message.status)
            case "heartbeat":
                if message.heartbeat.next_message_bytes:
                    self._events.on_announced(message.heartbeat.next_message_bytes)
            case kind:
                _log.warning("unexpected message", worker_id=self.worker.worker_id, kind=kind)

    def _disconnected(self, reason: str) -> None:
        was_connected, self.connected = self.connected, False
        self.tried.set()
        self._outbox.clear()
        if was_connected:
            self._events.on_lost(self, reason)
        else:
            _log.info("no connection", worker_id=self.worker.worker_id, address=self.worker.address, reason=reason)


def _describe(error: BaseException) -> str:
    """Status and details of a failed call, without the dump that its text has."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)

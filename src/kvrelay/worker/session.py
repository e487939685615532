"""One coordinator's stream: messages in, tasks on them, everything they produce out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeAlias

import structlog

from kvrelay.deadline import within
from kvrelay.errors import InvalidRequestError, KvrelayError
from kvrelay.grpc_options import MAX_MESSAGE_BYTES
from kvrelay.heartbeat import DEFAULT_HEARTBEAT, HeartbeatConfig, Silence, until_silent
from kvrelay.v1 import worker_pb2
from kvrelay.worker.outbox import Outbox, Write
from kvrelay.worker.role import DecodeRunner, PrefillRunner

_log = structlog.get_logger(__name__)
_STATUS_INTERVAL_S = 0.25
_MAX_DELTA_BYTES = MAX_MESSAGE_BYTES - 1024
"""The rest is for the messages around it."""
_Failed = worker_pb2.RequestFailed
_Request: TypeAlias = worker_pb2.Prefill | worker_pb2.Decode
_Work = Callable[[], Awaitable[None]]
"""Called in the job's own task: a job that is cancelled before it runs has started nothing."""


class Session:
    """The requests of one coordinator. They end with the stream that brought them, or that it does not read, or that
    brings nothing any more."""

    def __init__(
        self,
        prefill: PrefillRunner,
        decode: DecodeRunner,
        status: Callable[[], worker_pb2.WorkerStatus],
        *,
        coordinator_id: str = "",
        outbox: Outbox | None = None,
        heartbeat: HeartbeatConfig = DEFAULT_HEARTBEAT,
        silence: Silence | None = None,
    ) -> None:
        """`silence`: of the coordinator; None when it may say nothing for as long as it likes."""
        self._prefill = prefill
        self._decode = decode
        self._status = status
        self._coordinator_id = coordinator_id
        self._jobs: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._outbox = outbox or Outbox()
        self._heartbeat_s = heartbeat.interval_s
        self._interval_s = min(_STATUS_INTERVAL_S, heartbeat.interval_s)
        self._silence = silence

    async def run(
        self,
        messages: AsyncIterator[worker_pb2.CoordinatorMessage],
        write: Write,
    ) -> None:
        """Serve until the coordinator closes the stream or the caller is cancelled; no job outlives this.

        Raises a group with what `write` raises, or with `OutboxFullError` or `SilentError`.
        """
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(self._outbox.run(write)), tasks.create_task(self._report_status())]
            if self._silence is not None:
                loops.append(tasks.create_task(until_silent(self._silence, "the coordinator")))
            try:
                async for message in messages:
                    if self._silence is not None:
                        self._silence.heard(message.heartbeat.next_message_bytes, message.heartbeat.busy_ms)
                    self._handle(message, tasks)
            finally:
                for task in [*loops, *self._jobs.values()]:
                    task.cancel()

    async def _report_status(self) -> None:
        """Send the gauges when they have changed, and a heartbeat when nothing has waited to be sent for a while."""
        last = None
        quiet_s = 0.0
        while True:
            status = self._status()
            quiet_s = 0.0 if self._outbox.num_bytes else quiet_s + self._interval_s
            if status != last:
                self._outbox.post(worker_pb2.WorkerMessage(status=status))
                last = status
                quiet_s = 0.0
            elif quiet_s >= self._heartbeat_s:
                self._outbox.post(worker_pb2.WorkerMessage(heartbeat=worker_pb2.Heartbeat()))
                quiet_s = 0.0
            await asyncio.sleep(self._interval_s)

    def _handle(self, message: worker_pb2.CoordinatorMessage, tasks: asyncio.TaskGroup) -> None:
        match message.WhichOneof("message"):
            case "prefill":
                message.prefill.coordinator_id = self._coordinator_id
                prefill = partial(self._prefill.prefill, message.prefill, self._add_delta)
                self._start("prefill", message.prefill, prefill, tasks)
            case "decode":
                decode = partial(self._decode.decode, message.decode, self._add_delta)
                self._start("decode", message.decode, decode, tasks)
            case "cancel":
                self._cancel(message.cancel.request_id)
            case "kv_lost":
                self._decode.end_wait(message.kv_lost.request_id)

    def _start(self, kind: str, request: _Request, work: _Work, tasks: asyncio.TaskGroup) -> None:
        request_id, timeout_s = request.request_id, request.timeout_ms / 1e3 or None
        key = kind, request_id
        if key in self._jobs:
            self._fail(request_id, _Failed.REASON_INVALID, f"request {request_id} is running already")
            return
        job = self._jobs[key] = tasks.create_task(self._job(request_id, work, timeout_s), name=f"{kind}-{request_id}")
        job.add_done_callback(lambda _: self._jobs.pop(key))

    def _cancel(self, request_id: str) -> None:
        for kind in ("prefill", "decode"):
            job = self._jobs.get((kind, request_id))
            if job is not None:
                job.cancel()
        self._decode.forget(request_id)

    async def _job(self, request_id: str, work: _Work, timeout_s: float | None) -> None:
        try:
            async with within(timeout_s, f"request {request_id}"):
                await work()
        except InvalidRequestError as error:
            self._fail(request_id, _Failed.REASON_INVALID, error.message)
        except KvrelayError as error:
            self._fail(request_id, _Failed.REASON_UNAVAILABLE, error.message)
        except Exception:  # The boundary: one request's bug must not end the others.
            _log.exception("request failed", request_id=request_id)
            self._fail(request_id, _Failed.REASON_INTERNAL, f"request {request_id} failed; the worker's log says why")

    def _fail(self, request_id: str, reason: worker_pb2.RequestFailed.Reason.ValueType, message: str) -> None:
        failed = _Failed(request_id=request_id, reason=reason, message=message)
        self._outbox.post(worker_pb2.WorkerMessage(failed=failed))

    def _add_delta(self, delta: worker_pb2.TokenDelta) -> None:
        if delta.ByteSize() <= _MAX_DELTA_BYTES:
            self._outbox.add_delta(delta)
            return
        # Nobody else's tokens may end with a message that gRPC does not take.
        self._cancel(delta.request_id)
        message = f"one answer has {delta.ByteSize()} bytes and at most {_MAX_DELTA_BYTES} can be sent; ask for fewer"
        self._fail(delta.request_id, _Failed.REASON_INVALID, f"{message} log probabilities")

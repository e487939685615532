"""The Worker service: translates between gRPC and sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import structlog

from kvrelay.errors import InvalidRequestError, first_leaf, status_of
from kvrelay.heartbeat import DEFAULT_HEARTBEAT, HeartbeatConfig, SilentError
from kvrelay.v1 import worker_pb2, worker_pb2_grpc
from kvrelay.worker.outbox import OutboxFullError
from kvrelay.worker.record import WorkerRecord
from kvrelay.worker.role import DecodeRunner, PrefillRunner
from kvrelay.worker.session import Session

_log = structlog.get_logger(__name__)
_STATUSES: dict[type[BaseException], grpc.StatusCode] = {
    OutboxFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SilentError: grpc.StatusCode.ABORTED,
}
"""Why a session ends that nobody has ended."""

MAX_DRAIN_S = 86_400.0


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """One worker's sessions, gauges and role."""

    def __init__(
        self,
        record: WorkerRecord,
        status: Callable[[], worker_pb2.WorkerStatus],
        prefill: PrefillRunner,
        decode: DecodeRunner,
        on_drain: Callable[[float | None], None] = lambda _: None,
        heartbeat: HeartbeatConfig = DEFAULT_HEARTBEAT,
    ) -> None:
        """`on_drain` has the process leave, within so many seconds or its own setting; it must not block."""
        self._on_drain = on_drain
        self._heartbeat = heartbeat
        self._record = record
        self._status = status
        self._prefill = prefill
        self._decode = decode
        self._num_sessions = 0
        self._hung_up = asyncio.Event()
        self._hung_up.set()

    async def wait_hung_up(self) -> None:
        """Until no coordinator has a session. From a worker that drains they hang up when they have nothing there."""
        await self._hung_up.wait()

    async def Session(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[worker_pb2.CoordinatorMessage],
        context: grpc.aio.ServicerContext[worker_pb2.CoordinatorMessage, worker_pb2.WorkerMessage],
    ) -> None:
        """See worker.proto. A stream that breaks cancels this call, and with it the session's requests."""
        hello = await anext(request_iterator, None)
        if hello is None or hello.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session is hello")
        coordinator_id = hello.hello.coordinator_id
        with self._session(coordinator_id), self._decode.session(coordinator_id):
            own_hello = worker_pb2.WorkerHello(worker=self._record.info, heartbeat_ms=self._heartbeat.interval_ms)
            await context.write(worker_pb2.WorkerMessage(hello=own_hello))
            silence = self._heartbeat.silence_of(hello.hello.heartbeat_ms)
            session = Session(
                self._prefill,
                self._decode,
                self._status,
                coordinator_id=coordinator_id,
                heartbeat=self._heartbeat,
                silence=silence,
            )
            broken: BaseException | None = None
            try:
                await session.run(request_iterator, context.write)
            except* (OutboxFullError, SilentError) as group:
                broken = first_leaf(group)
            if broken is not None:
                _log.error("session ended", coordinator_id=coordinator_id, reason=str(broken))
                await context.abort(_STATUSES[type(broken)], str(broken))

    @contextlib.contextmanager
    def _session(self, coordinator_id: str) -> Iterator[None]:
        log = _log.bind(coordinator_id=coordinator_id)
        log.info("session opened")
        self._num_sessions += 1
        self._hung_up.clear()
        try:
            yield
        finally:
            self._num_sessions -= 1
            if not self._num_sessions:
                self._hung_up.set()
            log.info("session closed")

    async def GetStatus(
        self,
        request: worker_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GetStatusRequest, worker_pb2.WorkerStatus],
    ) -> worker_pb2.WorkerStatus:
        """See worker.proto."""
        return self._status()

    async def SetRole(
        self,
        request: worker_pb2.SetRoleRequest,
        context: grpc.aio.ServicerContext[worker_pb2.SetRoleRequest, worker_pb2.SetRoleResponse],
    ) -> worker_pb2.SetRoleResponse:
        """See worker.proto."""
        _log.info("role changes", role=request.role)
        try:
            await self._record.set_role(request.role)
        except InvalidRequestError as error:
            await context.abort(status_of(error).grpc, error.message)
        return worker_pb2.SetRoleResponse(worker=self._record.info)

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        """See worker.proto."""
        drain_s = request.drain_s if request.HasField("drain_s") else None
        if drain_s is not None and not 0 <= drain_s <= MAX_DRAIN_S:
            message = f"drain_s is {drain_s:g}; it must be from 0 to {MAX_DRAIN_S:g} seconds"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        self._on_drain(drain_s)
        return worker_pb2.DrainResponse()

"""The Worker service: translates between gRPC and sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.worker.role import DecodeRunner, PrefillRunner
from kvrelay.worker.session import Session

_log = structlog.get_logger(__name__)


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """One worker's sessions and gauges."""

    def __init__(
        self,
        info: Callable[[], cluster_pb2.WorkerInfo],
        status: Callable[[], worker_pb2.WorkerStatus],
        prefill: PrefillRunner,
        decode: DecodeRunner,
    ) -> None:
        self._info = info
        self._status = status
        self._prefill = prefill
        self._decode = decode

    async def Session(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[worker_pb2.CoordinatorMessage],
        context: grpc.aio.ServicerContext[worker_pb2.CoordinatorMessage, worker_pb2.WorkerMessage],
    ) -> None:
        """See worker.proto. A stream that breaks cancels this call, and with it the session's requests."""
        hello = await anext(request_iterator, None)
        if hello is None or hello.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session is hello")
        log = _log.bind(coordinator_id=hello.hello.coordinator_id)
        log.info("session opened")
        await context.write(worker_pb2.WorkerMessage(hello=worker_pb2.WorkerHello(worker=self._info())))
        try:
            await Session(self._prefill, self._decode, self._status).run(request_iterator, context.write)
        finally:
            log.info("session closed")

    async def GetStatus(
        self,
        request: worker_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GetStatusRequest, worker_pb2.WorkerStatus],
    ) -> worker_pb2.WorkerStatus:
        """See worker.proto."""
        return self._status()

"""A coordinator's session with one worker, written by hand over the generated stub."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio

from kvrelay.grpc_options import open_channel
from kvrelay.v1 import worker_pb2, worker_pb2_grpc


@dataclass(slots=True)
class Answer:
    """What came for one message."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: int = 0
    failed: worker_pb2.RequestFailed | None = None
    counters: dict[str, int] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    num_cached_tokens: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        return bool(self.finish_reason) or self.failed is not None

    def add(self, delta: worker_pb2.TokenDelta) -> None:
        assert not self.is_over, "a delta after the last one"
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason
        if delta.HasField("num_cached_tokens"):
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.HasField("timeline"):
            self.counters.update(delta.timeline.counters)
            self.events.extend(event.name for event in delta.timeline.events)
        if self.is_over:
            self.ended.set()

    def fail(self, failed: worker_pb2.RequestFailed) -> None:
        self.failed = failed
        self.ended.set()


class Link:
    """One coordinator's session with one worker. Answers by request id."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        self.answers: dict[str, Answer] = {}
        self.hello: worker_pb2.WorkerHello | None = None
        self.statuses: list[worker_pb2.WorkerStatus] = []
        self._call = self.stub.Session()
        self._outbox: asyncio.Queue[worker_pb2.CoordinatorMessage] = asyncio.Queue()

    async def write(self) -> None:
        """Until the stream breaks: a gRPC stream takes one message at a time."""
        hello = worker_pb2.CoordinatorHello(coordinator_id="test")
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            await self._call.write(worker_pb2.CoordinatorMessage(hello=hello))
            while True:
                await self._call.write(await self._outbox.get())

    async def read(self) -> None:
        """Until the stream breaks."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for message in self._call:
                self._take(message)

    def _take(self, message: worker_pb2.WorkerMessage) -> None:
        match message.WhichOneof("message"):
            case "hello":
                self.hello = message.hello
            case "step":
                for delta in message.step.deltas:
                    self.answers[delta.request_id].add(delta)
            case "failed":
                self.answers[message.failed.request_id].fail(message.failed)
            case "status":
                self.statuses.append(message.status)

    def prefill(self, request: worker_pb2.Prefill) -> Answer:
        """Send it; the answer fills itself."""
        answer = self.answers[request.request_id] = Answer()
        self._outbox.put_nowait(worker_pb2.CoordinatorMessage(prefill=request))
        return answer

    def decode(self, request: worker_pb2.Decode) -> Answer:
        """Send it; the answer fills itself."""
        answer = self.answers[request.request_id] = Answer()
        self._outbox.put_nowait(worker_pb2.CoordinatorMessage(decode=request))
        return answer

    def cancel(self, request_id: str) -> None:
        """Send it; nothing answers."""
        self._outbox.put_nowait(worker_pb2.CoordinatorMessage(cancel=worker_pb2.Cancel(request_id=request_id)))

    def kv_lost(self, request_id: str) -> None:
        """Send it; nothing answers."""
        self._outbox.put_nowait(worker_pb2.CoordinatorMessage(kv_lost=worker_pb2.KvLost(request_id=request_id)))

    def hang_up(self) -> None:
        """Break the stream, as a coordinator does that dies."""
        self._call.cancel()


@contextlib.asynccontextmanager
async def open_link(address: str) -> AsyncIterator[Link]:
    async with open_channel(address) as channel, asyncio.TaskGroup() as tasks:
        link = Link(channel)
        loops = [tasks.create_task(link.read()), tasks.create_task(link.write())]
        try:
            yield link
        finally:
            link.hang_up()
            for loop in loops:
                loop.cancel()


async def over(answer: Answer) -> Answer:
    """Wait for the last token, or the failure."""
    try:
        async with asyncio.timeout(20.0):
            await answer.ended.wait()
    except TimeoutError:
        raise AssertionError(f"not over within 20 s: {answer}") from None
    return answer

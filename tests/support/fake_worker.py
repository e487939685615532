"""A worker in this process that says what a test tells it to, over a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio

from kvrelay.grpc_options import server_options
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2, worker_pb2_grpc

Responder = Callable[["FakeWorker", worker_pb2.CoordinatorMessage], None]

MODEL = "fake-model"
BLOCK_TOKENS = 4


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """`received` holds every message but hello and heartbeats; `respond` is called with each, in the server's task.

    With `heartbeat_ms` it promises that it says something so often, and leaves that to the test.
    """

    def __init__(
        self,
        worker_id: str,
        role: cluster_pb2.Role,
        respond: Responder | None = None,
        *,
        model: str = MODEL,
        max_model_len_tokens: int = 512,
        fingerprint: bytes = b"layout",
        heartbeat_ms: int = 0,
    ) -> None:
        self.heartbeat_ms = heartbeat_ms
        self.num_heartbeats = 0
        self.busy_ms: list[int] = []
        """That its coordinator has told."""
        self.respond = respond
        self.num_sessions = 0
        self.num_ended = 0
        self.received: list[worker_pb2.CoordinatorMessage] = []
        self.info = cluster_pb2.WorkerInfo(
            worker_id=worker_id,
            role=role,
            state=cluster_pb2.WORKER_STATE_READY,
            model=model,
            max_model_len_tokens=max_model_len_tokens,
            incarnation="1",
            layout=cluster_pb2.KvLayout(block_size_tokens=BLOCK_TOKENS, fingerprint=fingerprint),
        )
        self._changed = asyncio.Condition()
        self._outbox: asyncio.Queue[worker_pb2.WorkerMessage | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        self._server = grpc.aio.server(options=server_options())
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.info.address = f"127.0.0.1:{self._server.add_insecure_port(listen)}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def Session(
        self, requests: AsyncIterator[worker_pb2.CoordinatorMessage], context: Any
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        self._outbox = asyncio.Queue()
        self.num_sessions += 1
        hello = await anext(aiter(requests))
        assert hello.WhichOneof("message") == "hello"
        own_hello = worker_pb2.WorkerHello(worker=self.info, heartbeat_ms=self.heartbeat_ms)
        yield worker_pb2.WorkerMessage(hello=own_hello)
        reader = asyncio.create_task(self._read(requests))
        try:
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self.num_ended += 1

    async def _read(self, requests: AsyncIterator[worker_pb2.CoordinatorMessage]) -> None:
        async for message in requests:
            if message.WhichOneof("message") == "heartbeat":
                self.num_heartbeats += 1
                self.busy_ms += [message.heartbeat.busy_ms] if message.heartbeat.busy_ms else []
                continue
            async with self._changed:
                self.received.append(message)
                self._changed.notify_all()
            if self.respond is not None:
                self.respond(self, message)

    def hang_up(self) -> None:
        """End the stream in good order, as a worker does that shuts down."""
        self._outbox.put_nowait(None)

    def send(self, *deltas: worker_pb2.TokenDelta) -> None:
        """One message for one engine step."""
        self._outbox.put_nowait(worker_pb2.WorkerMessage(step=worker_pb2.StepOutputs(deltas=deltas)))

    def send_failed(self, request_id: str, reason: worker_pb2.RequestFailed.Reason, message: str) -> None:
        failed = worker_pb2.RequestFailed(request_id=request_id, reason=reason, message=message)
        self._outbox.put_nowait(worker_pb2.WorkerMessage(failed=failed))

    def send_status(self, **values: Any) -> None:
        status = worker_pb2.WorkerStatus(worker_id=self.info.worker_id, **values)
        self._outbox.put_nowait(worker_pb2.WorkerMessage(status=status))

    def send_heartbeat(self, next_message_bytes: int = 0) -> None:
        beat = worker_pb2.Heartbeat(next_message_bytes=next_message_bytes)
        self._outbox.put_nowait(worker_pb2.WorkerMessage(heartbeat=beat))

    def kinds(self) -> list[str | None]:
        return [message.WhichOneof("message") for message in self.received]

    def messages(self, kind: str) -> list[Any]:
        return [getattr(message, kind) for message in self.received if message.WhichOneof("message") == kind]

    async def wait_for(self, kind: str, count: int = 1) -> list[Any]:
        """The messages of that kind, as soon as there are `count`."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(self.messages(kind)) >= count)
        return self.messages(kind)


def delta(
    request_id: str,
    token_ids: Sequence[int],
    finish: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED,
    **values: Any,
) -> worker_pb2.TokenDelta:
    return worker_pb2.TokenDelta(request_id=request_id, token_ids=token_ids, finish_reason=finish, **values)


class ScriptedModel:
    """A pair of workers that generate `tokens`, whatever is asked, one token per step.

    Stops by max_tokens, or at the end of the script as if its last token were a stop token. Where log probabilities are
    asked for, every token is certain.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._prompt_lens: dict[str, int] = {}

    def prefill(self, worker: FakeWorker, message: worker_pb2.CoordinatorMessage) -> None:
        if message.WhichOneof("message") == "prefill":
            request = message.prefill
            self._prompt_lens[request.request_id] = len(request.prompt_token_ids)
            is_last = len(self.tokens) == 1
            finish = common_pb2.FINISH_REASON_STOP if is_last else common_pb2.FINISH_REASON_LENGTH
            first = delta(request.request_id, self.tokens[:1], finish, num_cached_tokens=0)
            _add_logprobs(first, request.prompt_token_ids, request.sampling)
            worker.send(first)

    def decode(self, worker: FakeWorker, message: worker_pb2.CoordinatorMessage) -> None:
        if message.WhichOneof("message") != "decode":
            return
        request = message.decode
        source = request.prefill_request_id or request.request_id
        num_prompt = len(request.prompt_token_ids)
        start = num_prompt - self._prompt_lens.get(source, num_prompt)
        rest = self.tokens[start : start + request.sampling.max_tokens]
        for position, token in enumerate(rest):
            finish = common_pb2.FINISH_REASON_UNSPECIFIED
            if start + position == len(self.tokens) - 1:
                finish = common_pb2.FINISH_REASON_STOP
            elif position == len(rest) - 1:
                finish = common_pb2.FINISH_REASON_LENGTH
            said = delta(request.request_id, [token], finish)
            _add_logprobs(said, request.prompt_token_ids if not position else (), request.sampling)
            worker.send(said)


def _add_logprobs(
    said: worker_pb2.TokenDelta, prompt_token_ids: Sequence[int], sampling: common_pb2.SamplingParams
) -> None:
    if sampling.HasField("logprobs"):
        said.logprobs.CopyFrom(_certain(said.token_ids, sampling.logprobs))
    if prompt_token_ids and sampling.HasField("prompt_logprobs"):
        said.prompt_logprobs.CopyFrom(_certain(prompt_token_ids[1:], sampling.prompt_logprobs))


def _certain(token_ids: Sequence[int], num_others: int) -> common_pb2.Logprobs:
    width = 1 + max(num_others, 0)
    ids = [each for token in token_ids for each in (token, *range(width - 1))]
    values = [0.0 if not place % width else -9.0 for place in range(len(ids))]
    return common_pb2.Logprobs(width=width, token_ids=ids, logprobs=values, sampled_ranks=[1] * len(token_ids))

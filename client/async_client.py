"""How is a cluster used from asyncio?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, Unpack

import grpc
from google.protobuf.message import Message

from kvrelay.client.connection import OPTIONS, UnreachableError, client_error, trace_metadata
from kvrelay.client.coordinators import Coordinators
from kvrelay.client.encoding import generate_request, to_chunk, tokenize_request
from kvrelay.client.options import GenerateOptions, Messages, Prompt
from kvrelay.client.results import Chunk, Collector, Generation, Model
from kvrelay.client.resumption import RECONNECT_FOR_S, Resumption
from kvrelay.errors import KvrelayError
from kvrelay.v1 import inference_pb2, inference_pb2_grpc


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one generation, as they come.

    When its coordinator is lost it goes on with another one at the address, where it was.

    `aclose`, leaving an `async with` block, or dropping the stream cancels the generation everywhere. Raises the
    errors of `kvrelay.errors`; after an error or the end there is nothing to close.
    """

    def __init__(
        self,
        coordinators: Coordinators[inference_pb2_grpc.InferenceAsyncStub],
        resumption: Resumption,
        timeout_s: float | None,
    ) -> None:
        self._coordinators = coordinators
        self._resumption = resumption
        self._timeout_s = timeout_s
        self._closed = False
        self._start()

    def _start(self) -> None:
        resumption = self._resumption
        self._asked = self._coordinators.choose()
        generate = self._asked.stub.Generate
        self._call = generate(resumption.request, timeout=resumption.timeout_s, metadata=trace_metadata())
        self._responses = aiter(self._call)

    async def __anext__(self) -> Chunk:
        try:
            while not self._closed:
                try:
                    response = await anext(self._responses)
                except grpc.aio.AioRpcError as error:
                    failure = client_error(error, self._asked.address, self._timeout_s)
                    if isinstance(failure, UnreachableError):
                        self._coordinators.lost(self._asked)
                        if self._resumption.is_complete:
                            break
                    pause_s = self._resumption.pause_s(failure)
                    if pause_s is None:
                        raise failure from None
                    await asyncio.sleep(pause_s)
                    self._start()
                    continue
                self._resumption.took(response)
                return to_chunk(response)
            raise StopAsyncIteration
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise StopAsyncIteration from None  # another task closed the stream; nobody cancelled this one
            raise

    async def aclose(self) -> None:
        """Cancel what is still running. Idempotent."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._call.cancel()


class AsyncClient:
    """A connection to a cluster, for many calls at once. Make it inside the running event loop.

    `address` is host:port of the coordinator's gRPC port. `credentials` (`grpc.ssl_channel_credentials(...)`) turn TLS
    on. `timeout_s` bounds every call that does not bring its own.

    Several addresses may be given, of coordinators of one cluster: the next one is asked when one does not answer. A
    generation whose coordinator is lost goes on with another one, or with its successor at the address; they are tried
    for `reconnect_for_s`, and with 0 it fails.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float | None = None,
        reconnect_for_s: float = RECONNECT_FOR_S,
    ) -> None:
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._reconnect_for_s = reconnect_for_s
        self._channels: list[grpc.aio.Channel] = []
        self._coordinators = Coordinators(address, self._connect)
        self.address = self._coordinators.addresses

    def _connect(self, address: str) -> inference_pb2_grpc.InferenceAsyncStub:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            channel = grpc.aio.secure_channel(address, self._credentials, options=OPTIONS)
        self._channels.append(channel)
        return inference_pb2_grpc.InferenceStub(channel)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Start a generation and return its chunks. Raises `InvalidRequestError` for options of the wrong type."""
        request = generate_request(prompt, options)
        timeout_s = options.get("timeout_s", self._timeout_s)
        resumption = Resumption(
            request,
            reconnect_for_s=self._reconnect_for_s,
            timeout_s=timeout_s,
            num_coordinators=len(self._coordinators),
        )
        return AsyncStream(self._coordinators, resumption, timeout_s)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Wait for a whole generation. Cancelling the task cancels the generation everywhere.

        What had come before an error is in its `generated`.
        """
        collector = Collector()
        try:
            async with self.stream(prompt, **options) as chunks:
                async for chunk in chunks:
                    collector.add(chunk)
        except KvrelayError as error:
            error.generated = collector.token_ids
            raise
        return collector.result()

    async def models(self) -> list[Model]:
        """The models that can be asked for."""
        response = await self._unary("ListModels", inference_pb2.ListModelsRequest())
        return [Model(name=m.name, max_model_len_tokens=m.max_model_len_tokens) for m in response.models]

    async def tokenize(
        self, text: str | Messages, *, model: str = "", add_special_tokens: bool | None = None
    ) -> list[int]:
        """The token ids of a text, or of a conversation in the model's chat template."""
        request = tokenize_request(text, model, add_special_tokens)
        return list((await self._unary("Tokenize", request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return str((await self._unary("Detokenize", request)).text)

    async def close(self) -> None:
        """Cancel what is running and disconnect. Idempotent."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _unary(self, method: str, request: Message) -> Any:
        for num_left in reversed(range(len(self._coordinators))):
            asked = self._coordinators.choose()
            try:
                call = getattr(asked.stub, method)
                return await call(request, timeout=self._timeout_s, metadata=trace_metadata())
            except grpc.aio.AioRpcError as error:
                failure = client_error(error, asked.address, self._timeout_s)
                if not (num_left and isinstance(failure, UnreachableError)):
                    raise failure from None
                self._coordinators.lost(asked)
        raise AssertionError("there is a coordinator to ask")

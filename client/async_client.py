"""How is a cluster used from asyncio?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from kvrelay.client.connection import OPTIONS, client_error, trace_metadata
from kvrelay.client.encoding import generate_request, to_chunk, tokenize_request
from kvrelay.client.options import GenerateOptions, Messages, Prompt
from kvrelay.client.results import Chunk, Collector, Generation, Model
from kvrelay.errors import KvrelayError
from kvrelay.v1 import inference_pb2, inference_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one generation, as they come.

    `aclose`, leaving an `async with` block, or dropping the stream cancels the generation everywhere. Raises the
    errors of `kvrelay.errors`; after an error or the end there is nothing to close.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
        address: str,
        timeout_s: float | None,
    ) -> None:
        self._call = call
        self._responses = aiter(call)
        self._address = address
        self._timeout_s = timeout_s
        self._closed = False

    async def __anext__(self) -> Chunk:
        if self._closed:
            raise StopAsyncIteration
        try:
            return to_chunk(await anext(self._responses))
        except grpc.aio.AioRpcError as error:
            raise client_error(error, self._address, self._timeout_s) from None
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
    """A connection to one coordinator, for many calls at once. Make it inside the running event loop.

    `address` is host:port of the coordinator's gRPC port. `credentials` (`grpc.ssl_channel_credentials(...)`) turn TLS
    on. `timeout_s` bounds every call that does not bring its own.
    """

    def __init__(
        self, address: str, *, credentials: grpc.ChannelCredentials | None = None, timeout_s: float | None = None
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Start a generation and return its chunks. Raises `InvalidRequestError` for options of the wrong type."""
        request = generate_request(prompt, options)
        timeout_s = options.get("timeout_s", self._timeout_s)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=trace_metadata())
        return AsyncStream(call, self.address, timeout_s)

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
        response = await self._unary(self._stub.ListModels, inference_pb2.ListModelsRequest())
        return [Model(name=m.name, max_model_len_tokens=m.max_model_len_tokens) for m in response.models]

    async def tokenize(
        self, text: str | Messages, *, model: str = "", add_special_tokens: bool | None = None
    ) -> list[int]:
        """The token ids of a text, or of a conversation in the model's chat template."""
        request = tokenize_request(text, model, add_special_tokens)
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return (await self._unary(self._stub.Detokenize, request)).text

    async def close(self) -> None:
        """Cancel what is running and disconnect. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _unary(self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        try:
            return await method(request, timeout=self._timeout_s, metadata=trace_metadata())
        except grpc.aio.AioRpcError as error:
            raise client_error(error, self.address, self._timeout_s) from None

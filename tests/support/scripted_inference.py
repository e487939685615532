"""An Inference service that says what a test tells it to, in a thread with its own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kvrelay.v1 import common_pb2, inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
STOP = common_pb2.FINISH_REASON_STOP


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Answers with `responses`, then waits for ever if `hang`, else fails with `error` if there is one."""

    def __init__(self) -> None:
        self.address = ""
        self.responses: list[inference_pb2.GenerateResponse] = []
        self.hang = False
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.num_calls_before_error = 0
        self.requests: list[Any] = []
        self.metadata: dict[str, str | bytes] = {}
        self.cancelled = threading.Event()

    def say(self, *texts: str, completion_tokens: int = 3) -> None:
        """Script one completion in as many chunks as there are texts."""
        self.responses = [inference_pb2.GenerateResponse(request_id="r1", text=text) for text in texts]
        self.responses[-1].finish_reason = STOP
        self.responses[-1].usage.CopyFrom(inference_pb2.Usage(prompt_tokens=5, completion_tokens=completion_tokens))

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        await self._begin(request, context, fail=not self.responses)
        try:
            for response in self.responses:
                yield response
            if self.hang:
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        await self._begin(None, context, fail=True)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        await self._begin(request, context, fail=True)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(name="tiny", max_model_len_tokens=4096)])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        await self._begin(request, context, fail=True)
        return inference_pb2.TokenizeResponse(token_ids=[1, 2, 3])

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        await self._begin(request, context, fail=True)
        return inference_pb2.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))

    async def _begin(self, request: Any, context: Context, *, fail: bool) -> None:
        if request is not None:
            self.requests.append(request)
            self.metadata = dict(context.invocation_metadata() or ())
        if fail and self.error is not None and len(self.requests) > self.num_calls_before_error:
            await context.abort(*self.error)


@contextmanager
def scripted_inference(credentials: grpc.ServerCredentials | None = None) -> Iterator[ScriptedInference]:
    """Serves on a free port of the loopback interface; `address` tells which."""
    servicer = ScriptedInference()
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        servicer.address = f"localhost:{port}"
        ready.set()
        await stop.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="scripted-inference")
    thread.start()
    try:
        assert ready.wait(10), "the scripted service did not start"
        yield servicer
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()

"""Every client call gets one server span with its real status, whatever kind of handler served it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvrelay import tracing
from kvrelay.tracing import Tracing, configure_tracing, headers_of
from kvrelay.tracing_grpc import TracingServerInterceptor
from kvrelay.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver

SERVICE = "kvrelay.v1.Inference"
Context = grpc.aio.ServicerContext[Any, Any]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Servicer(inference_pb2_grpc.InferenceServicer):
    """One handler of each kind, steered by the request's text."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.traceparent = ""

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        current = tracing.current_context()
        self.traceparent = current.traceparent if current else ""
        yield inference_pb2.GenerateResponse(text="a")
        if request.text == "wait":
            self.reached.set()
            await asyncio.Event().wait()
        if request.text == "abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        yield inference_pb2.GenerateResponse(text="b")

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        if request.text == "crash":
            raise RuntimeError("bug")
        if request.text == "wait":
            self.reached.set()
            await asyncio.Event().wait()
        return inference_pb2.TokenizeResponse()


async def written(_request: object, context: Context) -> None:
    await context.write(b"a")


class Rig:
    """A traced server and a client of it."""

    def __init__(self, server: grpc.aio.Server, process: Tracing, receiver: OtlpReceiver) -> None:
        self.servicer = Servicer()  # type: ignore[abstract]
        inference_pb2_grpc.add_InferenceServicer_to_server(self.servicer, server)
        raw = grpc.method_handlers_generic_handler("raw", {"Write": grpc.unary_stream_rpc_method_handler(written)})
        server.add_generic_rpc_handlers((raw,))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self._server = server
        self._process = process
        self._receiver = receiver

    async def finish(self) -> list[ReceivedSpan]:
        """Stop everything; the spans that were made."""
        await self.channel.close()
        await self._server.stop(1)
        await asyncio.to_thread(self._process.shutdown)
        return self._receiver.spans


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    with otlp_receiver() as receiver:
        process = configure_tracing("coordinator", receiver.endpoint, set_global=False)
        server = grpc.aio.server(interceptors=[TracingServerInterceptor(process, SERVICE, "raw")])
        rig = Rig(server, process, receiver)
        await server.start()
        yield rig
        await rig.finish()


async def test_a_stream_is_one_span_below_the_callers(rig: Rig) -> None:
    caller = configure_tracing("client", None).start_span("x", common_pb2.TraceContext(traceparent=PARENT))
    call = rig.stub.Generate(inference_pb2.GenerateRequest(), metadata=list(headers_of(caller.context).items()))
    assert [message.text async for message in call] == ["a", "b"]
    (span,) = await rig.finish()
    assert (span.name, span.error, span.parent_id) == (f"{SERVICE}/Generate", None, PARENT[36:52])
    assert span.attributes["rpc.grpc.status_code"] == 0
    assert rig.servicer.traceparent.split("-")[1:3] == [span.trace_id, span.span_id]


async def test_an_aborted_stream_has_its_status(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in rig.stub.Generate(inference_pb2.GenerateRequest(text="abort")):
            pass
    (span,) = await rig.finish()
    assert span.error == "NOT_FOUND: no such model"


async def test_a_cancelled_stream_ends_its_span(rig: Rig) -> None:
    call = rig.stub.Generate(inference_pb2.GenerateRequest(text="wait"))
    assert (await anext(aiter(call))).text == "a"
    await rig.servicer.reached.wait()
    call.cancel()
    (span,) = await rig.finish()
    assert (span.error, span.attributes["rpc.grpc.status_code"]) == ("CANCELLED: CancelledError()", 1)


async def test_a_cancelled_unary_call_ends_its_span(rig: Rig) -> None:
    call = rig.stub.Tokenize(inference_pb2.TokenizeRequest(text="wait"))
    await rig.servicer.reached.wait()
    call.cancel()
    (span,) = await rig.finish()
    assert span.error == "CANCELLED: CancelledError()"


async def test_a_crash_is_an_unknown_error(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await rig.stub.Tokenize(inference_pb2.TokenizeRequest(text="crash"))
    (span,) = await rig.finish()
    assert span.error == "UNKNOWN: RuntimeError('bug')"


async def test_a_handler_that_writes_is_traced(rig: Rig) -> None:
    write: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = rig.channel.unary_stream("/raw/Write")
    call = write(b"")
    assert [message async for message in call] == [b"a"]
    (span,) = await rig.finish()
    assert (span.name, span.error) == ("raw/Write", None)


async def test_calls_of_other_services_and_methods_pass_untouched(rig: Rig) -> None:
    other: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = rig.channel.unary_unary("/other/Method")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await other(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert await rig.finish() == []

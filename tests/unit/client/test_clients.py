"""Both clients against a real gRPC server: results, errors, deadlines, and cancelling what nobody wants any more."""

import asyncio
import gc
import socket
from collections.abc import Iterator

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.context import attach, detach

from kvrelay.client import (
    AsyncClient,
    Client,
    DeadlineError,
    GenerationFailedError,
    InvalidRequestError,
    KvrelayError,
    ModelNotFoundError,
    NoWorkersError,
    OverloadedError,
    UnreachableError,
    WorkerLostError,
)
from tests.chaos.links import open_link
from tests.support.scripted_inference import ScriptedInference, scripted_inference


@pytest.fixture
def service() -> Iterator[ScriptedInference]:
    with scripted_inference() as service:
        yield service


@pytest.fixture
def client(service: ScriptedInference) -> Iterator[Client]:
    with Client(service.address, timeout_s=10) as client:
        yield client


def test_a_generation(service: ScriptedInference, client: Client) -> None:
    service.say("Par", "is")
    result = client.generate("The capital of France is", max_tokens=3)
    assert (result.text, result.finish_reason, result.request_id) == ("Paris", "stop", "r1")
    assert result.usage is not None
    assert result.usage.completion_tokens == 3
    assert service.requests[0].sampling.max_tokens == 3


def test_a_stream(service: ScriptedInference, client: Client) -> None:
    service.say("Par", "is")
    assert [chunk.text for chunk in client.stream("x")] == ["Par", "is"]


def test_the_other_calls(service: ScriptedInference, client: Client) -> None:
    assert [model.name for model in client.models()] == ["tiny"]
    assert client.tokenize("x", add_special_tokens=False) == [1, 2, 3]
    assert client.tokenize([{"role": "user", "content": "hi"}]) == [1, 2, 3]
    assert client.detokenize([4, 5]) == "4 5"
    assert service.requests[1].add_special_tokens is False
    assert service.requests[2].chat.messages[0].content == "hi"


@pytest.mark.parametrize("how", ["close", "with", "drop", "break"])
def test_leaving_a_stream_cancels_it(service: ScriptedInference, client: Client, how: str) -> None:
    service.say("a", "b")
    service.hang = True
    stream = client.stream("x")
    if how == "with":
        with stream:
            assert next(stream).text == "a"
    elif how == "break":
        for _ in stream:
            break
    else:
        assert next(stream).text == "a"
    if how == "close":
        stream.close()
        assert list(stream) == []
    del stream
    gc.collect()
    assert service.cancelled.wait(5)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, ModelNotFoundError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, NoWorkersError),
        (grpc.StatusCode.ABORTED, WorkerLostError),
        (grpc.StatusCode.INTERNAL, GenerationFailedError),
    ],
)
def test_statuses_are_exceptions_with_the_message(
    service: ScriptedInference, client: Client, code: grpc.StatusCode, kind: type[KvrelayError]
) -> None:
    service.error = (code, "max_tokens must be at least 1")
    with pytest.raises(kind, match=r"^max_tokens must be at least 1$") as raised:
        client.generate("x")
    assert type(raised.value) is kind
    with pytest.raises(kind):
        client.models()


def test_an_error_in_the_middle_comes_after_the_text(service: ScriptedInference, client: Client) -> None:
    service.say("a")
    service.error = (grpc.StatusCode.ABORTED, "worker d1 is gone")
    stream = client.stream("x")
    assert next(stream).text == "a"
    with pytest.raises(WorkerLostError, match="worker d1 is gone"):
        next(stream)


def test_a_deadline_ends_the_call(service: ScriptedInference, client: Client) -> None:
    service.say("a")
    service.hang = True
    with pytest.raises(DeadlineError, match=r"not finished within 0\.2 s"):
        client.generate("x", timeout_s=0.2)
    assert service.cancelled.wait(5)


def test_nobody_listening_is_said_with_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with Client(address) as client, pytest.raises(UnreachableError, match=f"no coordinator answers at {address}"):
            client.generate("x")


async def test_a_connection_that_breaks_in_the_middle_is_said_with_the_address(service: ScriptedInference) -> None:
    service.say("a", "b")
    del service.responses[1:]
    service.hang = True
    async with open_link("client", service.address) as link, AsyncClient(link.address, reconnect_for_s=0) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "a"
        link.reset()
        with pytest.raises(UnreachableError, match=f"no coordinator answers at {link.address}"):
            await anext(stream)


def test_credentials_turn_a_secure_channel_on() -> None:
    with (
        scripted_inference(grpc.local_server_credentials()) as service,
        Client(service.address, credentials=grpc.local_channel_credentials()) as client,
    ):
        assert client.detokenize([1]) == "1"


async def test_credentials_turn_a_secure_asyncio_channel_on() -> None:
    with scripted_inference(grpc.local_server_credentials()) as service:
        async with AsyncClient(service.address, credentials=grpc.local_channel_credentials()) as client:
            assert await client.detokenize([1]) == "1"


def test_the_callers_trace_goes_along(service: ScriptedInference, client: Client) -> None:
    span = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(1)))
    token = attach(trace.set_span_in_context(span))
    try:
        client.models()
    finally:
        detach(token)
    assert service.metadata["traceparent"] == f"00-{1:032x}-{2:016x}-01"


async def test_an_asyncio_generation(service: ScriptedInference) -> None:
    service.say("Par", "is")
    async with AsyncClient(service.address) as client:
        assert (await client.generate("x", n=1)).text == "Paris"
        assert [chunk.text async for chunk in client.stream("x")] == ["Par", "is"]
        assert [model.max_model_len_tokens for model in await client.models()] == [4096]
        assert await client.tokenize("x") == [1, 2, 3]
        assert await client.detokenize([4, 5]) == "4 5"


@pytest.mark.parametrize("how", ["aclose", "with", "drop", "cancel"])
async def test_leaving_an_asyncio_stream_cancels_it(service: ScriptedInference, how: str) -> None:
    service.say("a")
    service.hang = True
    async with AsyncClient(service.address) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "a"
        if how == "aclose":
            await stream.aclose()
            assert [chunk async for chunk in stream] == []
        elif how == "with":
            async with stream:
                pass
        elif how == "cancel":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(stream)
        del stream
        gc.collect()
        assert await asyncio.to_thread(service.cancelled.wait, 5)


async def test_closing_from_another_task_ends_the_iteration(service: ScriptedInference) -> None:
    service.say("a")
    service.hang = True
    async with AsyncClient(service.address) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "a"
        async with asyncio.TaskGroup() as tasks:
            rest = tasks.create_task(_texts(stream))
            await stream.aclose()
        assert rest.result() == []


async def _texts(stream: object) -> list[str]:
    return [chunk.text async for chunk in stream]  # type: ignore[attr-defined]


async def test_asyncio_errors_are_the_same(service: ScriptedInference) -> None:
    service.error = (grpc.StatusCode.NOT_FOUND, "model 'x' is not served here")
    async with AsyncClient(service.address) as client:
        with pytest.raises(ModelNotFoundError, match="model 'x' is not served here"):
            await client.generate("x")
        with pytest.raises(ModelNotFoundError):
            await client.models()

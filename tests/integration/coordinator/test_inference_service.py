"""Does the gRPC service say the same as the engine, and map what goes wrong?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest

from kvrelay.client.connection import client_error
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.http_parameters import CHAT, COMPLETION
from kvrelay.coordinator.inference_service import InferenceService
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.coordinator.sampling_checks import SAMPLING
from kvrelay.errors import RequestTooLargeError
from kvrelay.grpc_options import MAX_MESSAGE_BYTES, open_channel, server_options
from kvrelay.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.deaf_grpc import deaf_client
from tests.support.fake_cluster import FakeCluster, fake_cluster
from tests.support.fake_worker import MODEL, delta

Generate = inference_pb2.GenerateRequest
PROMPT = list(range(1000, 1020))


@contextlib.asynccontextmanager
async def service(
    front_end: FrontEnd, tokens: Sequence[int] | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> AsyncIterator[tuple[FakeCluster, Any]]:
    """A cluster and a stub of its Inference service."""
    async with (
        served(front_end, tokens, max_message_bytes=max_message_bytes) as (cluster, port),
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield cluster, inference_pb2_grpc.InferenceStub(channel)


@contextlib.asynccontextmanager
async def served(
    front_end: FrontEnd,
    tokens: Sequence[int] | None = None,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    stall_timeout_s: float = 60.0,
) -> AsyncIterator[tuple[FakeCluster, int]]:
    """A cluster and the port of its Inference service."""
    async with fake_cluster(front_end, tokens) as cluster:
        server = grpc.aio.server(options=server_options(max_message_bytes=max_message_bytes))
        servicer = InferenceService(cluster.engine, stall_timeout_s=stall_timeout_s)
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield cluster, port
        finally:
            await server.stop(None)


def script_of(front_end: FrontEnd, text: str) -> list[int]:
    tokenizer = front_end.renderer.get_tokenizer()
    return [*tokenizer.encode(text, add_special_tokens=False), front_end.renderer.get_eos_token_id()]


def greedy(**values: Any) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(temperature=0.0, **values)


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    async with asyncio.timeout(20):
        return [response async for response in call]


async def test_streams_text_tokens_and_usage(front_end: FrontEnd) -> None:
    script = script_of(front_end, "The capital is Paris.")
    async with service(front_end, script) as (_, stub):
        request = Generate(token_ids=common_pb2.TokenIds(ids=PROMPT), sampling=greedy(), request_id="mine")
        responses = await collect(stub.Generate(request))
        assert "".join(response.text for response in responses) == "The capital is Paris."
        assert [token for response in responses for token in response.token_ids] == script
        assert responses[-1].finish_reason == common_pb2.FINISH_REASON_STOP
        assert (responses[-1].usage.prompt_tokens, responses[-1].usage.completion_tokens) == (20, len(script))
        assert {response.request_id for response in responses} == {"mine"}
        assert not any(response.HasField("usage") for response in responses[:-1])


async def test_chat_goes_through_the_template_like_tokenize_says(front_end: FrontEnd) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="Hi?")])
    async with service(front_end, script_of(front_end, "Hello")) as (cluster, stub):
        tokenized = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        assert tokenized.max_model_len_tokens == 512
        await collect(stub.Generate(Generate(chat=chat, sampling=greedy())))
        (prefill,) = cluster.prefill.messages("prefill")
        assert list(prefill.prompt_token_ids) == list(tokenized.token_ids)
        text = (await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokenized.token_ids))).text
        assert text.endswith("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n")


async def test_text_prompt_is_tokenized(front_end: FrontEnd) -> None:
    async with service(front_end, script_of(front_end, "Hello")) as (cluster, stub):
        text = "one two three four five six"
        tokenized = await stub.Tokenize(inference_pb2.TokenizeRequest(text=text))
        await collect(stub.Generate(Generate(text=text, sampling=greedy())))
        (prefill,) = cluster.prefill.messages("prefill")
        assert list(prefill.prompt_token_ids) == list(tokenized.token_ids)


async def test_models_are_listed(front_end: FrontEnd) -> None:
    async with service(front_end) as (_, stub):
        (model,) = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.name, model.max_model_len_tokens) == (MODEL, 512)


async def test_timeline_comes_when_asked_for(front_end: FrontEnd) -> None:
    async with service(front_end, script_of(front_end, "Hello")) as (_, stub):
        prompt = common_pb2.TokenIds(ids=PROMPT)
        plain = await collect(stub.Generate(Generate(token_ids=prompt, sampling=greedy())))
        assert not plain[-1].HasField("timeline")
        told = await collect(stub.Generate(Generate(token_ids=prompt, sampling=greedy(), include_timeline=True)))
        assert "prefill.first_token" in [event.name for event in told[-1].timeline.events]


async def test_logprobs_name_the_sampled_and_the_most_likely(front_end: FrontEnd) -> None:
    async with service(front_end) as (cluster, stub):
        sampling = greedy(max_tokens=1, logprobs=1, prompt_logprobs=0)
        call = stub.Generate(Generate(token_ids=common_pb2.TokenIds(ids=[30, 31]), sampling=sampling))
        (decode,) = await cluster.decode.wait_for("decode")
        rows = common_pb2.Logprobs(width=2, token_ids=[40, 41], logprobs=[-1.5, -0.25], sampled_ranks=[2])
        prompt_rows = common_pb2.Logprobs(width=1, token_ids=[31], logprobs=[-3.0], sampled_ranks=[9])
        cluster.decode.send(
            delta(
                decode.request_id,
                [40],
                common_pb2.FINISH_REASON_LENGTH,
                logprobs=rows,
                prompt_logprobs=prompt_rows,
            )
        )
        (response,) = await collect(call)
        (token,) = response.logprobs
        assert (token.sampled.token_id, token.sampled.logprob, token.sampled.rank) == (40, -1.5, 2)
        assert [(top.token_id, top.rank) for top in token.top] == [(41, 1)]
        (prompt_token,) = response.prompt_logprobs
        assert (prompt_token.sampled.token_id, prompt_token.sampled.rank) == (31, 9)
        assert not prompt_token.top


async def test_cancelling_the_call_cancels_on_the_workers(front_end: FrontEnd) -> None:
    async with service(front_end) as (cluster, stub):
        call = stub.Generate(Generate(token_ids=common_pb2.TokenIds(ids=PROMPT), sampling=greedy()))
        reading = asyncio.create_task(collect(call))
        await cluster.prefill.wait_for("prefill")
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await cluster.prefill.wait_for("cancel")
        await cluster.decode.wait_for("cancel")
        cluster.assert_idle()


TOKENS = common_pb2.TokenIds(ids=[1])


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (Generate(model="gpt-9", token_ids=TOKENS), "NOT_FOUND", "gpt-9"),
        (Generate(), "INVALID_ARGUMENT", "text, token_ids and chat"),
        (Generate(text=""), "INVALID_ARGUMENT", "empty"),
        (Generate(token_ids=common_pb2.TokenIds()), "INVALID_ARGUMENT", "empty"),
        (Generate(token_ids=common_pb2.TokenIds(ids=[3] * 600)), "INVALID_ARGUMENT", "512"),
        (Generate(token_ids=common_pb2.TokenIds(ids=[49152])), "INVALID_ARGUMENT", "49151"),
        (Generate(text="word " * 600), "INVALID_ARGUMENT", "512"),
        (Generate(token_ids=TOKENS, request_id="a b"), "INVALID_ARGUMENT", "request_id"),
        (Generate(token_ids=TOKENS, sampling=common_pb2.SamplingParams(top_p=3)), "INVALID_ARGUMENT", "top_p"),
        (Generate(token_ids=TOKENS, sampling=common_pb2.SamplingParams(max_tokens=0)), "INVALID_ARGUMENT", "max_tok"),
        (Generate(token_ids=TOKENS, sampling=common_pb2.SamplingParams(n=0)), "INVALID_ARGUMENT", "n is 0"),
        (Generate(token_ids=TOKENS, sampling=common_pb2.SamplingParams(eos_token_id=3)), "INVALID_ARGUMENT", "eos"),
        (
            Generate(
                token_ids=TOKENS,
                sampling=common_pb2.SamplingParams(structured_output=common_pb2.StructuredOutput(json_schema="{")),
            ),
            "INVALID_ARGUMENT",
            "JSON",
        ),
        (
            Generate(
                token_ids=TOKENS,
                sampling=common_pb2.SamplingParams(structured_output=common_pb2.StructuredOutput(regex="a" * 70_000)),
            ),
            "INVALID_ARGUMENT",
            "at most 65536",
        ),
        (Generate(chat=inference_pb2.Chat()), "INVALID_ARGUMENT", "chat.messages"),
        (
            Generate(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="robot")])),
            "INVALID_ARGUMENT",
            "role",
        ),
    ],
)
async def test_bad_requests_get_a_status_that_names_the_reason(
    front_end: FrontEnd, request_: inference_pb2.GenerateRequest, code: str, says: str
) -> None:
    async with service(front_end) as (cluster, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await collect(stub.Generate(request_))
        assert raised.value.code().name == code
        assert says in (raised.value.details() or "")
        assert not cluster.decode.received
        assert not cluster.prefill.received
        cluster.assert_idle()


LIMITS = RequestLimits()


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"n": LIMITS.max_n + 1}, "from 1 to 128"),
        ({"stop": ["x"] * (LIMITS.max_stop_strings + 1)}, "at most 16 strings"),
        ({"stop": ["x" * (LIMITS.max_stop_chars + 1)]}, "of 1 to 256 characters"),
        ({"stop_token_ids": [1] * (LIMITS.max_stop_token_ids + 1)}, "at most 256 token ids"),
        ({"stop_token_ids": [49152]}, "from 0 to 49151"),
        ({"logit_bias": dict.fromkeys(range(LIMITS.max_logit_biases + 1), 1.0)}, "at most 1024 fields"),
        ({"logit_bias": {1: 101.0}}, "from -100 to 100"),
        ({"bad_words": ["x"] * (LIMITS.max_bad_words + 1)}, "at most 128 strings"),
        ({"logprobs": 1000}, "logprobs is 1000"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_sampling_has_the_limits_of_the_openai_api(
    front_end: FrontEnd, sampling: dict[str, Any], says: str
) -> None:
    request = Generate(token_ids=TOKENS, sampling=common_pb2.SamplingParams(**sampling))
    async with service(front_end) as (cluster, stub):
        with pytest.raises(grpc.aio.AioRpcError, match=says) as raised:
            await collect(stub.Generate(request))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not cluster.decode.received


@pytest.mark.parametrize(
    ("method", "request_", "says"),
    [
        (
            "Detokenize",
            inference_pb2.DetokenizeRequest(token_ids=[1] * (LIMITS.max_detokenize_tokens + 1)),
            "at most 131072 token ids",
        ),
        (
            "Tokenize",
            inference_pb2.TokenizeRequest(text="x" * (LIMITS.max_tokenize_chars + 1)),
            "1048577 characters; at most 1048576",
        ),
        (
            "Tokenize",
            inference_pb2.TokenizeRequest(
                chat=inference_pb2.Chat(messages=[{"role": "user"}] * (LIMITS.max_messages + 1))  # type: ignore[list-item]
            ),
            "4097 messages; at most 4096",
        ),
    ],
)
async def test_so_have_texts_and_tokens(front_end: FrontEnd, method: str, request_: Any, says: str) -> None:
    async with service(front_end) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError, match=says) as raised:
            await getattr(stub, method)(request_)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_both_apis_share_their_checks() -> None:
    for table in (CHAT, COMPLETION):
        assert {name: table[name] for name in SAMPLING} == SAMPLING


async def test_a_message_over_the_limit_is_too_large_and_not_an_overload(front_end: FrontEnd) -> None:
    async with service(front_end, max_message_bytes=10_000) as (cluster, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await collect(stub.Generate(Generate(text="x" * 20_000)))
        assert not cluster.decode.received
    error = client_error(raised.value, "coordinator", None)
    assert isinstance(error, RequestTooLargeError), error


async def test_without_workers_the_status_is_unavailable(front_end: FrontEnd) -> None:
    async with service(front_end) as (cluster, stub):
        cluster.pool.leave("d1")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await collect(stub.Generate(Generate(token_ids=TOKENS)))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_token_ids_outside_of_the_vocabulary_are_not_detokenized(front_end: FrontEnd) -> None:
    async with service(front_end) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[49152]))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_workers_know_how_long_the_client_waits(front_end: FrontEnd) -> None:
    request = Generate(token_ids=common_pb2.TokenIds(ids=PROMPT), sampling=greedy())
    async with service(front_end) as (cluster, stub):
        call = stub.Generate(request, timeout=30)
        (prefill,) = await cluster.prefill.wait_for("prefill")
        assert 29_000 < prefill.timeout_ms <= 31_000  # gRPC rounds what it tells the server up.
        cluster.prefill.send(delta(prefill.request_id, [5], common_pb2.FINISH_REASON_LENGTH))
        (decode,) = await cluster.decode.wait_for("decode")
        assert 28_000 < decode.timeout_ms <= prefill.timeout_ms
        call.cancel()
        call = stub.Generate(request)
        _, prefill = await cluster.prefill.wait_for("prefill", 2)
        assert prefill.timeout_ms == 0
        call.cancel()


async def test_a_deadline_that_passes_frees_the_workers(front_end: FrontEnd) -> None:
    request = Generate(token_ids=common_pb2.TokenIds(ids=PROMPT), sampling=greedy())
    async with service(front_end) as (cluster, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await collect(stub.Generate(request, timeout=0.3))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await cluster.prefill.wait_for("cancel")
        await cluster.decode.wait_for("cancel")
        cluster.assert_idle()


@pytest.mark.parametrize("window_bytes", [0, 100])
async def test_a_call_whose_client_takes_nothing_is_ended(front_end: FrontEnd, window_bytes: int) -> None:
    request = Generate(token_ids=common_pb2.TokenIds(ids=PROMPT), sampling=greedy(max_tokens=50))
    async with served(front_end, stall_timeout_s=0.3) as (cluster, port), deaf_client(port) as client:
        client.call("/kvrelay.v1.Inference/Generate", request.SerializeToString(), window_bytes=window_bytes)
        (prefill,) = await cluster.prefill.wait_for("prefill")
        cluster.prefill.send(delta(prefill.request_id, [5]))
        (decode,) = await cluster.decode.wait_for("decode")
        for token in range(6, 12):
            cluster.decode.send(delta(decode.request_id, [token]))
            await asyncio.sleep(0.02)
        await cluster.decode.wait_for("cancel")
        cluster.assert_idle()
        if window_bytes:  # Of a client that never took anything nobody hears what it is told.
            client.listen()
            async with asyncio.timeout(10):
                assert await client.ended() > window_bytes


async def test_a_call_that_waits_for_tokens_is_not_ended(front_end: FrontEnd) -> None:
    request = Generate(token_ids=common_pb2.TokenIds(ids=PROMPT), sampling=greedy(max_tokens=50))
    async with (
        served(front_end, stall_timeout_s=0.2) as (cluster, port),
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        (prefill,) = await cluster.prefill.wait_for("prefill")
        await asyncio.sleep(0.5)
        cluster.prefill.send(delta(prefill.request_id, [5], common_pb2.FINISH_REASON_STOP))
        assert [list(response.token_ids) for response in await collect(call)] == [[5]]

"""Bad requests over HTTP: each gets OpenAI's error object with the right status, and no worker hears of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.v1 import worker_pb2
from tests.support.fake_worker import MODEL, delta
from tests.support.gateway import GatewayUnderTest, gateway

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOKENS = [504, 253, 2]
_INT64 = 2**63


@pytest.fixture
async def served(front_end: FrontEnd) -> AsyncIterator[GatewayUnderTest]:
    async with gateway(front_end, TOKENS) as under_test:
        yield under_test


def check_error(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of the error object, whose form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["type"].endswith("Error")
    assert error["message"]
    assert len(error["message"]) <= 2000
    if param is not None:
        assert error["param"] == param
    return str(error["message"])


def assert_nothing_left(served: GatewayUnderTest) -> None:
    served.cluster.assert_idle()
    assert served.cluster.prefill.received == []
    assert served.cluster.decode.received == []


BAD_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_p", 1e-320),
    ("top_k", -5),
    ("top_k", 2**31),
    ("top_k", 1.5),
    ("min_p", -1),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-320),
    ("repetition_penalty", 1e300),
    ("seed", _INT64),
    ("seed", -_INT64 - 1),
    ("seed", 10**400),
    ("seed", 1.5),
    ("n", 0),
    ("n", -1),
    ("n", 129),
    ("n", 1_000_000),
    ("n", "2"),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", _INT64),
    ("max_tokens", "7"),
    ("max_tokens", 513),
    ("min_tokens", -1),
    ("min_tokens", 100_000),
    ("ignore_eos", "yes"),
    ("stop", ["x"] * 17),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["x" * 257]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [49152]),
    ("stop_token_ids", [2**70]),
    ("stop_token_ids", list(range(257))),
    ("stop_token_ids", ["1"]),
    ("logit_bias", {"49152": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"one": 1}),
    ("logit_bias", {"٣": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "5"}),
    ("logit_bias", {str(token): 1 for token in range(1025)}),
    ("logit_bias", [1]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [49152]),
    ("bad_words", [""]),
    ("bad_words", ["word"] * 129),
    ("bad_words", ["w" * 257]),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("priority", 2**31),
    ("cache_salt", 7),
    ("cache_salt", "x" * 129),
    ("response_format", "json"),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x" * 70_000]}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
    ("structured_outputs", {"regex": "("}),
    ("structured_outputs", {"regex": "a\x00"}),
    ("structured_outputs", {"regex": "(" * 3000 + "a" + ")" * 3000}),
    ("structured_outputs", {"regex": "a" * 70_000}),
    ("structured_outputs", {"json": "{"}),
    ("structured_outputs", {"grammar": ""}),
    ("structured_outputs", {"choice": []}),
    ("structured_outputs", {"choice": ["a"], "regex": "a"}),
    ("structured_outputs", {"_backend": "outlines", "regex": "a"}),
    ("structured_outputs", {}),
    ("unheard_of", 1),
    ("use_beam_search", True),
    ("kv_transfer_params", {"load": [1]}),
    ("vllm_xargs", {"a": 1}),
    ("prompt_embeds", "AAAA"),
    ("watermarking", True),
    ("thinking_token_budget", 5),
    ("model", 5),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
async def test_an_impossible_parameter_is_refused_and_named(served: GatewayUnderTest, route: str, stream: bool) -> None:
    content = {"prompt": "Hello"} if route == COMPLETIONS else {"messages": [{"role": "user", "content": "Hello"}]}
    for name, value in BAD_SAMPLING:
        body = {"model": MODEL, **content, "stream": stream, name: value}
        if name == "stream_options":
            body["stream"] = False
        response = await served.post(route, body)
        assert response.status_code == 400, (name, value, response.text)
        message = check_error(response, 400)
        assert name in (response.json()["error"]["param"] or message), (name, value, response.text)
    assert_nothing_left(served)


BAD_BODIES: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b'{"prompt": "Hello", "temperature": NaN}',
    b'{"prompt": "Hello", "temperature": Infinity}',
    b'{"prompt": "Hello", "temperature": 1e400}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "Hello"} and more',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "Hello", "response_format": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:30]))
async def test_a_body_that_is_no_json_object_is_refused(served: GatewayUnderTest, body: bytes) -> None:
    response = await served.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    check_error(response, 400)
    assert_nothing_left(served)


async def test_another_media_type_is_refused(served: GatewayUnderTest) -> None:
    body = json.dumps({"prompt": "Hello"}).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = await served.http.post(COMPLETIONS, content=body, headers={"content-type": content_type})
        check_error(response, 415)


BAD_PROMPTS: list[Any] = [
    None,
    "",
    [],
    [[]],
    [""],
    ["Hello", ""],
    5,
    {"a": 1},
    [1, "a"],
    ["a", 1],
    [[1], "a", {}],
    [1.5],
    [True],
    [-1],
    [49152],
    [2**80],
    [[1, 2], [3, 99_999]],
    [[[1]]],
    [1] * 512,
    "word " * 600,
    ["fits", "word " * 600],
    "x" * 5_000_000,
    ["x"] * 1025,
    ["x"] * 100_000,
    [[1]] * 100_000,
    [1] * 1_000_000,
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda prompt: repr(prompt)[:30])
async def test_a_bad_prompt_is_refused(served: GatewayUnderTest, prompt: Any) -> None:
    for stream in (False, True):
        message = check_error(await served.post(COMPLETIONS, {"prompt": prompt, "stream": stream}), 400)
        assert "prompt" in message.lower() or "token" in message, message
    assert_nothing_left(served)


async def test_too_many_completions_of_several_prompts_are_refused(served: GatewayUnderTest) -> None:
    response = await served.post(COMPLETIONS, {"prompt": ["a"] * 100, "n": 100})
    assert "1024" in check_error(response, 400, "prompt")
    assert_nothing_left(served)


BAD_MESSAGES: list[Any] = [
    None,
    [],
    "Hello",
    {},
    ["Hello"],
    [{}],
    [{"content": "Hello"}],
    [{"role": "user", "content": 5}],
    [{"role": 5, "content": "Hello"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}]}],
    [{"role": "user", "content": [{"image_url": "http://127.0.0.1:1/cat.png"}]}],
    [{"role": "user", "content": ["Hello"]}],
    [{"role": "user", "content": "Hello"}] * 4097,
    [{"role": "user", "content": "word " * 600}],
    [{"role": "assistant", "tool_calls": 7}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda messages: repr(messages)[:40])
async def test_bad_messages_are_refused(served: GatewayUnderTest, messages: Any) -> None:
    for stream in (False, True):
        check_error(await served.post(CHAT, {"messages": messages, "stream": stream}), 400)
    assert_nothing_left(served)


BAD_CHAT: list[dict[str, Any]] = [
    {"logprobs": 5},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": True, "top_logprobs": -1},
    {"top_logprobs": 3},
    {"max_completion_tokens": 0},
    {"max_completion_tokens": _INT64},
    {"tools": []},
    {"tools": [5]},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}]},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "required"},
    {"tool_choice": "whichever"},
    {"tool_choice": 5},
    {"tool_choice": {"type": "function"}},
    {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"continue_final_message": True, "add_generation_prompt": True},
    {"reasoning_effort": "boundless"},
    {"media_io_kwargs": {"image": {}}},
    {"functions": []},
]


@pytest.mark.parametrize("fields", BAD_CHAT, ids=lambda fields: repr(fields)[:40])
async def test_bad_fields_of_a_chat_are_refused(served: GatewayUnderTest, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream, **fields}
        check_error(await served.post(CHAT, body), 400)
    assert_nothing_left(served)


BAD_COMPLETION: list[dict[str, Any]] = [
    {"logprobs": 21},
    {"logprobs": -1},
    {"logprobs": True},
    {"max_tokens": 10, "min_tokens": 11},
    {"max_tokens": 0},
    {"suffix": "x"},
    {"temperature": 0, "n": 2},
    {"seed": _INT64 - 1, "n": 3},
    {"stream": True, "prompt_logprobs": 1},
]


@pytest.mark.parametrize("fields", BAD_COMPLETION, ids=lambda fields: repr(fields)[:40])
async def test_bad_fields_of_a_completion_are_refused(served: GatewayUnderTest, fields: dict[str, Any]) -> None:
    check_error(await served.post(COMPLETIONS, {"prompt": "Hello", **fields}), 400)
    assert_nothing_left(served)


async def test_bad_requests_to_tokenize_are_refused(served: GatewayUnderTest) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    for body in (
        {},
        {"prompt": "a", "messages": messages},
        {"prompt": 5},
        {"prompt": ["a"]},
        {"messages": "a"},
        {"prompt": "x" * 2**21},
    ):
        check_error(await served.post("/tokenize", body), 400)
    for body in (
        {},
        {"tokens": "a"},
        {"tokens": [-1]},
        {"tokens": [49152]},
        {"tokens": [2**70]},
        {"tokens": [1] * 2**18},
    ):
        check_error(await served.post("/detokenize", body), 400)
    for route, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        check_error(await served.post(route, {**body, "model": "other"}), 404, "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_not_found(served: GatewayUnderTest, stream: bool) -> None:
    body = {"model": "other", "prompt": "Hello", "stream": stream}
    assert "other" in check_error(await served.post(COMPLETIONS, body), 404, "model")
    body = {"model": "other", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    check_error(await served.post(CHAT, body), 404, "model")
    check_error(await served.http.get("/v1/models/other"), 404, "model")
    assert_nothing_left(served)


async def test_unknown_paths_and_methods_get_the_error_object(served: GatewayUnderTest) -> None:
    check_error(await served.http.get("/"), 404)
    check_error(await served.http.post("/v1/embeddings", json={}), 404)
    response = await served.http.get(CHAT)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    check_error(await served.http.post("/health"), 405)
    assert (await served.http.head("/health")).status_code == 200
    check_error(await served.http.delete("/v1/models/fake-model"), 405)


async def test_a_body_over_the_limit_is_refused_while_it_comes(front_end: FrontEnd) -> None:
    async with gateway(front_end, TOKENS, limits=RequestLimits(max_body_bytes=1000)) as served:
        big = json.dumps({"prompt": "x" * 2000}).encode()
        headers = {"content-type": "application/json"}
        response = await served.http.post(COMPLETIONS, content=big, headers=headers)
        assert "1000" in check_error(response, 413)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(big), 100):
                yield big[start : start + 100]

        response = await served.http.post(COMPLETIONS, content=pieces(), headers=headers)
        check_error(response, 413)
        fits = json.dumps({"prompt": "Hello", "max_tokens": 1, "user": "x" * 900}).encode()
        assert (await served.http.post(COMPLETIONS, content=fits, headers=headers)).status_code == 200


async def test_a_body_that_does_not_come_times_out(front_end: FrontEnd) -> None:
    async with gateway(front_end, TOKENS, limits=RequestLimits(body_timeout_s=0.05)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: 100\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
async def test_without_workers_the_answer_is_503_with_retry_after(front_end: FrontEnd, stream: bool) -> None:
    async with gateway(front_end, TOKENS) as served:
        for worker in ("p1", "d1"):
            served.cluster.pool.leave(worker)
        check_error(await served.http.get("/ready"), 503)
        assert (await served.http.get("/health")).status_code == 200
        response = await served.post(COMPLETIONS, {"prompt": "Hello", "stream": stream})
        check_error(response, 503)
        assert response.headers["retry-after"] == "1"
        served.cluster.assert_idle()


async def test_too_many_requests_in_flight_get_429(front_end: FrontEnd) -> None:
    async with gateway(front_end, TOKENS, config=ClusterEngineConfig(max_requests=1)) as served:
        response = await served.post(COMPLETIONS, {"prompt": "Hello", "n": 2})
        check_error(response, 429)
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unforeseen_failure_tells_its_request_id_only(
    served: GatewayUnderTest, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a secret of the implementation")

    monkeypatch.setattr(served.cluster.engine._dispatcher, "submit", fail)
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    response = await served.post(CHAT, body, **{"x-request-id": "my-request"})
    message = check_error(response, 500)
    assert "my-request" in message
    assert "secret" not in response.text
    assert "my-request" in caplog.text
    assert "secret" in caplog.text


async def test_a_failure_in_the_middle_of_a_stream_ends_it_with_an_error_event(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served, asyncio.TaskGroup() as tasks:
        body = {"prompt": [1, 2, 3], "stream": True, "max_tokens": 5}
        answer = tasks.create_task(served.post(COMPLETIONS, body))
        (request,) = await served.cluster.decode.wait_for("decode")
        served.cluster.decode.send(delta(request.request_id, [504]))
        reason = worker_pb2.RequestFailed.REASON_INTERNAL
        served.cluster.decode.send_failed(request.request_id, reason, "the engine's secret")
        response = await answer
        assert response.status_code == 200
        first, error, done = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
        assert json.loads(first)["choices"][0]["text"]
        assert json.loads(error)["error"]["code"] == 500
        assert "secret" not in error
        assert done == "[DONE]"
        served.cluster.assert_idle()

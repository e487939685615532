"""Whatever a client posts as JSON, it gets an answer, or OpenAI's error object and not status 500."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import msgspec
from starlette.types import ASGIApp

from kvrelay.coordinator.http_connection import Connection, StreamListener
from tests.fuzz.front_end import front_end
from tests.fuzz.target import AsyncCheck, Target, in_loop
from tests.support.fake_cluster import FakeCluster, fake_cluster
from tests.support.fake_worker import MODEL
from tests.support.gateway import gateway_app

_SCRIPT = [5, 6, 7, 8]
_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
# fmt: off
_WORDS = (
    "messages", "prompt", "model", "max_tokens", "stream", "temperature", "stop", "logprobs", "n", "tools",
    "tool_choice", "response_format", "content", "role", "stream_options", "include_usage", "seed", "logit_bias",
    "top_logprobs", "echo", "min_tokens", "prompt_logprobs", "json_schema", "null", "true",
)
# fmt: on


class _Connection:
    """For plain streams."""

    is_writable = True

    def __init__(self) -> None:
        self.body = b""

    def attach(self, listener: StreamListener | None) -> None:
        """Nobody leaves."""

    def write(self, body: bytes) -> None:
        self.body += body


@contextlib.asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    async with fake_cluster(front_end(), _SCRIPT) as cluster:
        app = gateway_app(cluster)
        yield lambda data: _check(cluster, app, data)


async def _check(cluster: FakeCluster, app: ASGIApp, data: bytes) -> None:
    """The first byte says what it is posted to, and whether a plain stream may be written to the connection."""
    if not data:
        return
    sent: list[Any] = []
    body = [{"type": "http.request", "body": data[1:], "more_body": False}]

    async def receive() -> Any:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    connection: Connection = _Connection()
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": _PATHS[data[0] % 4],
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "extensions": {"kvrelay.connection": connection} if data[0] & 4 else {},
    }
    await app(scope, receive, cast("Any", send))
    assert sent[0]["type"] == "http.response.start", sent
    assert not sent[-1].get("more_body", False), "the answer does not end"
    status, answer = sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])
    assert status < 500, answer
    if status >= 400:
        assert msgspec.json.decode(answer)["error"]["message"]
    assert b'"code":500' not in answer, answer
    cluster.assert_nothing_requested()
    for worker in (cluster.prefill, cluster.decode):
        worker.received.clear()


def _seeds() -> Iterator[bytes]:
    messages = [{"role": "user", "content": "Hi?"}]
    chat = {"model": MODEL, "messages": messages, "max_tokens": 3, "temperature": 0}
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    schema = {"name": "a", "schema": {"type": "object", "properties": {"b": {"type": "string"}}}}
    asked: list[tuple[int, dict[str, Any]]] = [
        (0, chat),
        (4, {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        (0, {**chat, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 2, "stop": ["x"], "seed": 1}),
        (0, {**chat, "tools": [weather], "tool_choice": "none", "logit_bias": {"5": 1.5}}),
        (0, {**chat, "response_format": {"type": "json_schema", "json_schema": schema}}),
        (0, {**chat, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}]}),
        (1, {"prompt": "one two", "max_tokens": 3, "echo": True, "logprobs": 1, "prompt_logprobs": 1}),
        (5, {"prompt": [1, 2, 3], "stream": True, "max_tokens": 3, "ignore_eos": True, "min_tokens": 2}),
        (1, {"prompt": [[1, 2], [3]], "best_of": 1, "suffix": None, "cache_salt": "s", "priority": 1}),
        (2, {"prompt": "one", "add_special_tokens": False}),
        (2, {"messages": messages, "add_generation_prompt": True}),
        (3, {"tokens": [1, 2, 3]}),
    ]
    for kind, body in asked:
        yield bytes([kind]) + msgspec.json.encode(body)


TARGET = Target(
    "http_bodies",
    "bodies of POST requests",
    lambda: in_loop(_open),
    _seeds,
    tuple(f'"{word}"'.encode() for word in _WORDS),
)

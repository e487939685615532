"""Clients that go away: the generation ends at once on every worker, and nothing is left in the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.http_app import build_app
from kvrelay.coordinator.http_routes import Probes
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.v1 import common_pb2
from tests.support.fake_cluster import fake_cluster, until
from tests.support.fake_worker import delta
from tests.support.gateway import GatewayUnderTest, gateway

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LONG_PROMPT = list(range(1, 11))
LIMIT_S = 1.0
"""Within this time after the connection closed, the workers must have heard of it."""


@contextlib.asynccontextmanager
async def raw_request(served: GatewayUnderTest, path: str, body: dict[str, Any]) -> AsyncIterator[socket.socket]:
    """A request on a bare socket, which the test may close as rudely as it likes."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    try:
        await loop.sock_connect(connection, ("127.0.0.1", served.port))
        await loop.sock_sendall(connection, head.encode() + payload)
        yield connection
    finally:
        connection.close()


def reset(connection: socket.socket) -> None:
    """Close with RST, as a process does that is killed with data unread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def content(path: str) -> dict[str, Any]:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "Tell me a very long story."}]}
    return {"prompt": LONG_PROMPT}


async def assert_all_ends(served: GatewayUnderTest, num_cancels: int = 1) -> None:
    closed = time.monotonic()
    await served.cluster.decode.wait_for("cancel", num_cancels)
    await until(lambda: served.cluster.engine.num_requests == 0)
    assert time.monotonic() - closed < LIMIT_S
    served.cluster.assert_idle()


@pytest.mark.parametrize("abrupt", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_closing_before_the_first_token_ends_the_request(
    front_end: FrontEnd, path: str, stream: bool, abrupt: bool
) -> None:
    async with (
        gateway(front_end, with_prefill=False) as served,
        raw_request(served, path, {**content(path), "stream": stream}) as connection,
    ):
        await served.cluster.decode.wait_for("decode")
        reset(connection) if abrupt else connection.close()
        await assert_all_ends(served)


async def test_closing_ends_the_prefill_too(front_end: FrontEnd) -> None:
    async with gateway(front_end) as served:
        async with raw_request(served, COMPLETIONS, {"prompt": LONG_PROMPT, "seed": 1, "stream": True}):
            await served.cluster.prefill.wait_for("prefill")
        await served.cluster.prefill.wait_for("cancel")
        await until(lambda: served.cluster.engine.num_requests == 0)
        served.cluster.assert_idle()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_closing_in_the_middle_of_a_stream_ends_the_request(front_end: FrontEnd, path: str) -> None:
    async with (
        gateway(front_end, with_prefill=False) as served,
        raw_request(served, path, {**content(path), "stream": True}) as connection,
    ):
        (request,) = await served.cluster.decode.wait_for("decode")
        served.cluster.decode.send(delta(request.request_id, [504]))
        received = b""
        while b"data: " not in received:
            received += await asyncio.get_running_loop().sock_recv(connection, 65536)
        reset(connection)
        await assert_all_ends(served)


async def test_closing_ends_every_completion_of_every_prompt(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served:
        body = {"prompt": [LONG_PROMPT, LONG_PROMPT, LONG_PROMPT], "n": 2, "stream": True}
        async with raw_request(served, COMPLETIONS, body) as connection:
            await served.cluster.decode.wait_for("decode", 6)
            reset(connection)
            await assert_all_ends(served, 6)
        cancelled = {cancel.request_id for cancel in served.cluster.decode.messages("cancel")}
        assert cancelled == {request.request_id for request in served.cluster.decode.messages("decode")}


async def test_a_client_that_stops_reading_and_then_leaves_ends_the_request(front_end: FrontEnd) -> None:
    """The stream is stuck in a send, as it is when the socket's buffers are full, while the connection breaks."""
    async with fake_cluster(front_end, with_prefill=False) as cluster, asyncio.TaskGroup() as tasks:
        app = build_app(
            cluster.engine, served_model_name=front_end.served_model_name, probes=Probes(ready=lambda: True)
        )
        stuck, gone = asyncio.Event(), asyncio.Event()
        body = json.dumps({"prompt": LONG_PROMPT, "stream": True}).encode()
        messages = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                stuck.set()
                await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}
        serving = tasks.create_task(app(scope, receive, send))
        (request,) = await cluster.decode.wait_for("decode")
        cluster.decode.send(delta(request.request_id, [504]))
        await stuck.wait()
        gone.set()
        await cluster.decode.wait_for("cancel")
        await serving
        cluster.assert_idle()


async def test_closing_while_the_body_is_sent_leaves_nothing(front_end: FrontEnd) -> None:
    async with gateway(front_end, limits=RequestLimits(body_timeout_s=30)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: 1000\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert await reader.read() == b""
        assert served.cluster.decode.received == []


async def test_others_go_on_when_one_client_leaves(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served, asyncio.TaskGroup() as tasks:
        stays = tasks.create_task(served.post(COMPLETIONS, {"prompt": [7, 8], "max_tokens": 2}))
        (kept,) = await served.cluster.decode.wait_for("decode")
        async with raw_request(served, COMPLETIONS, {"prompt": [9, 10], "max_tokens": 2}) as connection:
            await served.cluster.decode.wait_for("decode", 2)
            reset(connection)
            (cancel,) = await served.cluster.decode.wait_for("cancel")
        assert kept.request_id != cancel.request_id
        served.cluster.decode.send(delta(kept.request_id, [504]))
        served.cluster.decode.send(delta(kept.request_id, [504], common_pb2.FINISH_REASON_LENGTH))
        response = await stays
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 2
        served.cluster.assert_idle()

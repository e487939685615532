"""A server that drains answers what is on its way over connections that it has, and closes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.http_server import HttpServer, http_server
from tests.support.fake_cluster import until
from tests.support.fake_worker import delta
from tests.support.gateway import gateway

_REQUEST = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[HttpServer, asyncio.StreamReader, asyncio.StreamWriter]]:
    async with http_server(_answer, "127.0.0.1:0", drain_s=5) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            yield server, reader, writer
        finally:
            writer.close()


async def _until_refused(server: HttpServer) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            except OSError:
                return
            writer.close()


@pytest.mark.parametrize("num_before", [0, 1])
async def test_a_request_that_comes_during_the_drain_is_answered(num_before: int) -> None:
    async with connected() as (server, reader, writer):
        for _ in range(num_before):
            writer.write(_REQUEST)
            assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        server.begin_drain(5)
        await _until_refused(server)
        writer.write(_REQUEST)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer


async def test_a_connection_without_a_request_is_closed_soon() -> None:
    async with connected() as (server, reader, _):
        server.begin_drain(5)
        async with asyncio.timeout(3):
            assert await reader.read() == b""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"logprobs": 1}], ids=["plain", "whole"])
async def test_what_is_not_done_in_time_is_told_to_try_again(
    front_end: FrontEnd, stream: bool, sampling: dict[str, int]
) -> None:
    async with gateway(front_end) as served:
        body = {"model": front_end.served_model_name, "prompt": [1], "max_tokens": 5, "stream": stream, **sampling}
        asking = asyncio.create_task(served.post("/v1/completions", body))
        (decode,) = await served.cluster.decode.wait_for("decode")
        if stream and not sampling:
            served.cluster.decode.send(delta(decode.request_id, [40]))
            await until(lambda: served.cluster.engine.metrics.num_generated_tokens)
        served.server.begin_drain(0.1)
        answer = await asking
        assert "this coordinator stops" in answer.text
        if answer.headers["content-type"] == "application/json":
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "ServiceUnavailableError"
        else:
            assert stream
            assert answer.text.endswith("data: [DONE]\n\n")
        await served.cluster.decode.wait_for("cancel")
        served.cluster.assert_idle()

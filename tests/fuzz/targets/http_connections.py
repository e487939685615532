"""Whatever bytes a client sends, it gets HTTP or a closed connection, and its connection is not kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from kvrelay.coordinator.http_server import http_server
from tests.fuzz.front_end import front_end
from tests.fuzz.target import BETWEEN, AsyncCheck, Target, in_loop, joined, pieces
from tests.support.eventually import eventually
from tests.support.fake_cluster import fake_cluster
from tests.support.fake_worker import MODEL
from tests.support.gateway import gateway_app

_SCRIPT = [5, 6, 7, 8]


@contextlib.asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    async with (
        fake_cluster(front_end(), _SCRIPT) as cluster,
        http_server(gateway_app(cluster), "127.0.0.1:0", drain_s=1) as server,
    ):
        open_connections = server._server.server_state.connections

        async def check(data: bytes) -> None:
            answer = await _say(server.port, pieces(data))
            assert not answer or answer.startswith(b"HTTP/1.1 "), answer
            assert b"HTTP/1.1 500" not in answer, answer
            await eventually(lambda: not open_connections and not cluster.engine.num_requests, "all of it is over")
            cluster.assert_nothing_requested()
            for worker in (cluster.prefill, cluster.decode):
                worker.received.clear()

        yield check


async def _say(port: int, parts: list[bytes]) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(OSError):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0)
            writer.write_eof()
            return await reader.read()
        return b""
    finally:
        writer.close()


def _seeds() -> Iterator[bytes]:
    body = b'{"model": "%b", "prompt": "one two", "max_tokens": 3, "stream": true}' % MODEL.encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
    targets = b"x-kvrelay-ttft-s: 5\r\nx-kvrelay-class: batch\r\nx-kvrelay-tenant: t\r\n"
    targets += b"x-kvrelay-explain: 1\r\nx-request-id: r\r\n"
    chunked = b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    fixed = b"content-length: %d\r\n\r\n" % len(body) + body
    yield joined([head, targets, fixed])
    yield joined([head + chunked, b"GET /metrics HTTP/1.1\r\n\r\n"])
    yield b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\nHEAD /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    yield head + b"expect: 100-continue\r\nupgrade: websocket\r\nconnection: upgrade\r\n" + fixed
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


TARGET = Target(
    "http_connections",
    "all that comes over an HTTP connection",
    lambda: in_loop(_open),
    _seeds,
    (BETWEEN, b"\r\n\r\n", b"content-length: ", b"transfer-encoding: chunked\r\n", b" HTTP/1.1\r\n", b"connection: "),
)

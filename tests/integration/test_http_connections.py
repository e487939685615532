"""Clients that only connect, dribble, or do not read get no more than their share."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvrelay.coordinator.connection_limits import ConnectionLimits, connections_within
from kvrelay.coordinator.http_server import http_server

_REQUEST = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
_CHUNK = bytes(1 << 16)


class App:
    """Answers briefly, or without an end to who asks for /endless."""

    def __init__(self) -> None:
        self.num_open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_open += 1
        try:
            if scope["path"] == "/endless":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                gone = asyncio.create_task(_gone(receive))
                while not gone.done():
                    await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
                    await asyncio.sleep(0)
                return
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
        finally:
            self.num_open -= 1


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    def __init__(self, app: App, port: int) -> None:
        self.app = app
        self.port = port
        self._open: list[asyncio.StreamWriter] = []

    async def connect(self) -> Connection:
        connection = await asyncio.open_connection("127.0.0.1", self.port)
        self._open.append(connection[1])
        return connection

    async def ask(self) -> bytes:
        reader, writer = await self.connect()
        writer.write(_REQUEST)
        answer = await reader.readuntil(b"ok")
        writer.close()
        return answer

    def close(self) -> None:
        for writer in self._open:
            writer.transport.abort()


@asynccontextmanager
async def served(**limits: Any) -> AsyncIterator[Served]:
    app = App()
    async with http_server(app, "127.0.0.1:0", drain_s=1, limits=ConnectionLimits(**limits)) as server:
        found = Served(app, server.port)
        try:
            yield found
        finally:
            found.close()


async def _ended(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.read()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n", _REQUEST[:-2]], ids=["nothing", "a line", "no end"])
async def test_who_does_not_finish_its_headers_is_disconnected(said: bytes) -> None:
    async with served(header_timeout_s=0.2) as server:
        reader, writer = await server.connect()
        writer.write(said)
        assert await _ended(reader) == b""
        assert b"200 OK" in await server.ask()


async def test_who_dribbles_its_headers_is_disconnected_too() -> None:
    async with served(header_timeout_s=0.3) as server:
        reader, writer = await server.connect()
        ended = asyncio.create_task(_ended(reader))
        for byte in b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1000:
            if ended.done():
                break
            writer.write(bytes([byte]))
            await asyncio.wait([ended], timeout=0.02)
        assert await ended == b""


async def test_a_connection_that_has_had_an_answer_has_the_time_again() -> None:
    async with served(header_timeout_s=0.5) as server:
        reader, writer = await server.connect()
        for _ in range(3):
            writer.write(_REQUEST[:10])
            await asyncio.sleep(0.3)
            writer.write(_REQUEST[10:])
            assert b"200 OK" in await reader.readuntil(b"ok")


async def test_connections_over_the_limit_are_told_so_and_later_ones_taken() -> None:
    async with served(max_connections=3) as server:
        taken = [await server.connect() for _ in range(3)]
        for reader, writer in taken:
            writer.write(_REQUEST)
            await reader.readuntil(b"ok")
        reader, writer = await server.connect()
        writer.write(_REQUEST)
        head, _, body = (await _ended(reader)).partition(b"\r\n\r\n")
        assert b"503 Service Unavailable" in head
        assert b"retry-after: 1" in head
        assert "3 connections are open" in json.loads(body)["error"]["message"]
        taken[0][1].close()
        async with asyncio.timeout(10):
            while b"503" in await _answer(server):
                continue


async def _answer(server: Served) -> bytes:
    reader, writer = await server.connect()
    writer.write(_REQUEST)
    answer = await reader.readline()
    writer.close()
    return answer


async def test_who_does_not_read_is_disconnected() -> None:
    async with served(stall_timeout_s=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as deaf:
            deaf.sendall(b"GET /endless HTTP/1.1\r\nhost: h\r\n\r\n")
            async with asyncio.timeout(10):
                while not server.app.num_open:
                    await asyncio.sleep(0.01)
                while server.app.num_open:
                    await asyncio.sleep(0.01)
        assert b"200 OK" in await server.ask()


async def test_who_reads_slowly_is_served() -> None:
    async with served(stall_timeout_s=0.5) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /endless HTTP/1.1\r\nhost: h\r\n\r\n")
        for _ in range(20):
            assert await reader.read(1 << 20)
            await asyncio.sleep(0.05)
        assert server.app.num_open == 1
        writer.transport.abort()
        async with asyncio.timeout(10):
            while server.app.num_open:
                await asyncio.sleep(0.01)


def test_files_bound_connections() -> None:
    limits = ConnectionLimits(max_connections=10_000)
    assert connections_within(limits, 1 << 20) == 10_000
    assert connections_within(limits, 1024) == 768
    assert connections_within(limits, 10) == 1

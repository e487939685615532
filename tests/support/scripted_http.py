"""An HTTP server that says what the test wrote, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class Exchange:
    """One request that came, and the way to answer it."""

    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    """Number of the connection that it came on."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def client_gone(self) -> None:
        """Waits until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            await self.reader.read()

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self, status: int, body: bytes, **headers: str) -> None:
        named = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        await self.send(f"HTTP/1.1 {status} x\r\n{named}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def begin_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def event(self, data: bytes) -> None:
        content = b"data: " + data + b"\n\n"
        await self.send(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    async def tokens(self, *texts: str) -> None:
        for text in texts:
            await self.event(msgspec.json.encode({"choices": [{"index": 0, "text": text}]}))

    async def end_stream(self) -> None:
        await self.event(b"[DONE]")
        await self.send(b"0\r\n\r\n")


Handler = Callable[[Exchange], Awaitable[None]]


@dataclass(slots=True)
class ScriptedHttp:
    url: str
    exchanges: list[Exchange] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    """Connections."""


@contextlib.asynccontextmanager
async def scripted_http(handler: Handler) -> AsyncIterator[ScriptedHttp]:
    """Answers each request by `handler`; a connection that it closes takes no more. All are closed at the end."""
    served = ScriptedHttp(url="")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.num_connections += 1
        served.num_open += 1
        connection = served.num_connections
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while not writer.is_closing():
                    exchange = await _read(reader, writer, connection)
                    served.exchanges.append(exchange)
                    await handler(exchange)
        finally:
            served.num_open -= 1
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield served


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> Exchange:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Exchange(first.split()[1], headers, body, connection, reader, writer)

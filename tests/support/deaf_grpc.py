"""A gRPC client that calls, and takes nothing or little of the answer: its window is that small."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4
_STREAM = 1


class DeafClient:
    """One call over one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def call(self, method: str, request: bytes, *, window_bytes: int = 0) -> None:
        """Send all of a call; `method` is `/package.Service/Method`."""
        headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "deaf"}
        headers |= {"content-type": "application/grpc", "te": "trailers"}
        window = struct.pack("!HI", _INITIAL_WINDOW_SIZE, window_bytes)
        self._writer.write(_PREFACE + _frame(_SETTINGS, 0, 0, window))
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
        self._writer.write(_frame(_HEADERS, _END_HEADERS, _STREAM, block))
        message = struct.pack("!BI", 0, len(request)) + request
        self._writer.write(_frame(_DATA, _END_STREAM, _STREAM, message))

    def listen(self) -> None:
        """Take everything from now on."""
        self._writer.write(_frame(_WINDOW_UPDATE, 0, _STREAM, struct.pack("!I", 1 << 24)))

    async def ended(self) -> int:
        """Wait for the end of the call or connection, and meanwhile answer pings; returns how many bytes came."""
        num_bytes = 0
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                payload = await self._reader.readexactly(size)
                if kind == _DATA:
                    num_bytes += size
                if kind == _RST_STREAM or (kind == _HEADERS and flags & _END_STREAM):
                    break
                if kind == _PING and not flags & _ACK:
                    self._writer.write(_frame(_PING, _ACK, 0, payload))
        return num_bytes


@contextlib.asynccontextmanager
async def deaf_client(port: int) -> AsyncIterator[DeafClient]:
    """Connected to a port of this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield DeafClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(text: str) -> bytes:
    """HPACK: a literal without Huffman coding, shorter than 127."""
    return bytes((len(text),)) + text.encode()

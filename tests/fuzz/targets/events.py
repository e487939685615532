"""Server-sent events, and the answers around them: the same whatever pieces they come in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

from kvrelay.client.http_connection import Answer, HttpConnection, HttpProtocolError
from kvrelay.client.sse import EventParser
from tests.fuzz.target import AsyncCheck, Target, in_loop


class _Transport:
    """Of a server that has said all."""

    def __init__(self) -> None:
        self.is_closed = False

    def write(self, data: bytes) -> None:
        """The request."""

    def is_closing(self) -> bool:
        return self.is_closed

    def abort(self) -> None:
        self.is_closed = True


@asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    yield _check


async def _check(data: bytes) -> None:
    """The first byte says how long the pieces are."""
    if not data:
        return
    size, said = 1 + data[0], data[1:]
    whole, parts = EventParser(), EventParser()
    events = [event for piece in _cut(said, size) for event in parts.feed(piece)]
    assert whole.feed(said) == events
    assert await _answer(said, len(said) or 1) == await _answer(said, size)


async def _answer(said: bytes, size: int) -> tuple[Answer, bytes] | None:
    """None for what is none."""
    connection = HttpConnection()
    connection.connection_made(cast("Any", _Transport()))
    body = bytearray()
    exchange = asyncio.create_task(connection.exchange(b"GET / HTTP/1.1\r\n\r\n", body.extend))
    await asyncio.sleep(0)
    for piece in _cut(said, size):
        connection.data_received(piece)
    connection.connection_lost(None)
    try:
        return await exchange, bytes(body)
    except HttpProtocolError:
        return None


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def _seeds() -> Iterator[bytes]:
    events = b'data: {"choices": []}\n\ndata:x\r\n: comment\r\n\r\nevent: y\ndata: a\ndata: b\n\ndata: [DONE]\n\n'
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(events), events)
    fixed = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
    open_end = b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n" + events
    for said in (events, chunked, fixed, open_end):
        yield b"\x04" + said


TARGET = Target(
    "events", "answers of an OpenAI server", lambda: in_loop(_open), _seeds, (b"data:", b"\r\n\r\n", b"HTTP/1.1 ")
)

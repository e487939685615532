"""When did each token of a completion arrive? Over HTTP, with little work: the client shares the cores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

_HEADERS_MOST_BYTES = 1 << 20
_DATA = b"data: "
_DONE = b"[DONE]"


class Arrival(NamedTuple):
    """Tokens that came in one event."""

    at_s: float
    """By `time.perf_counter`."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """An OpenAI API: `url` without /v1."""

    url: str
    model: str


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Event).decode


class StreamError(RuntimeError):
    """The server did not answer as it should; the message has its answer."""


async def completion(server: Server, prompt: Sequence[int], max_tokens: int) -> AsyncGenerator[Arrival, None]:
    """Exactly `max_tokens` tokens to a prompt of token ids, on a connection of its own, which is closed at the end.

    To close the iterator early ends the request. Raises `StreamError` and `OSError`.
    """
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=_HEADERS_MOST_BYTES)
    try:
        writer.write(_request(server, address.netloc, prompt, max_tokens))
        status = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0]
        if b" 200 " not in status + b" ":
            raise StreamError(f"{server.url} answered {status.decode()}: {(await reader.read(2000)).decode()}")
        async for data in _events(reader):
            num_tokens = sum(len(choice.token_ids or ()) for choice in _decode(data).choices)
            if num_tokens:
                yield Arrival(time.perf_counter(), num_tokens)
    finally:
        writer.close()


def _request(server: Server, host: str, prompt: Sequence[int], max_tokens: int) -> bytes:
    body = msgspec.json.encode(
        {
            "model": server.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event, of servers that write one as a whole.

    Lines of the chunked transfer coding are no events and are passed over.
    """
    while line := await reader.readline():
        if line.startswith(_DATA):
            data = line[len(_DATA) :].strip()
            if data == _DONE:
                return
            yield data
    raise StreamError("the stream ended before it was done")

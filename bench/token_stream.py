"""When did each token of a completion arrive? Over HTTP, with little work: the client shares the cores."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

import msgspec

from kvrelay.client.http_connection import Answer
from kvrelay.client.http_pool import HttpPool, Origin
from kvrelay.client.replay.answer_reader import AnswerReader, error_text


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


class StreamError(RuntimeError):
    """The server did not answer as it should; the message has its answer."""


async def completion(server: Server, prompt: Sequence[int], max_tokens: int) -> AsyncGenerator[Arrival, None]:
    """Exactly `max_tokens` tokens to a prompt of token ids, on a connection of its own, which is closed at the end.

    To close the iterator early ends the request. Raises `StreamError` and `OSError`.
    """
    reader, came = AnswerReader(time.perf_counter), asyncio.Event()

    def on_body(piece: bytes) -> None:
        reader.on_body(piece)
        came.set()

    async with HttpPool(Origin.parse(server.url)) as pool:
        exchange = asyncio.ensure_future(pool.exchange(_request(pool.origin, server, prompt, max_tokens), on_body))
        exchange.add_done_callback(lambda _: came.set())
        num_told = 0
        try:
            while not exchange.done():
                await came.wait()
                came.clear()
                for at_s, num_tokens in reader.tokens_since(num_told):
                    num_told += 1
                    yield Arrival(at_s, num_tokens)
            _check(server, exchange.result(), reader)
        finally:
            exchange.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await exchange


def _request(origin: Origin, server: Server, prompt: Sequence[int], max_tokens: int) -> bytes:
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    return origin.request("POST", "/v1/completions", {}, msgspec.json.encode(body))


def _check(server: Server, answer: Answer, reader: AnswerReader) -> None:
    if answer.status != HTTPStatus.OK:
        raise StreamError(f"{server.url} answered {answer.status}: {error_text(answer.body)}")
    if not reader.is_done:
        raise StreamError("the stream ended before it was done")

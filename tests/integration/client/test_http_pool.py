"""The HTTP client against a server that answers in every way that servers do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from kvrelay.client.http_connection import HttpProtocolError
from kvrelay.client.http_pool import HttpPool, Origin, UnreachableServerError
from tests.support.eventually import eventually
from tests.support.scripted_http import Exchange, scripted_http


def request(pool: HttpPool, body: bytes = b"{}") -> bytes:
    return pool.origin.request("POST", "/v1/completions", {"x-kvrelay-tenant": "a"}, body)


async def test_a_request_arrives_as_it_was_written_and_its_answer_comes_back() -> None:
    def tea(exchange: Exchange) -> Awaitable[None]:
        return exchange.answer(418, b"tea", Retry_After="7")

    async with scripted_http(tea) as server, HttpPool(Origin.parse(f"{server.url}/v1")) as pool:
        answer = await pool.exchange(request(pool, b'{"a": 1}'))
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (418, b"tea", "7")
    (came,) = server.exchanges
    assert (came.path, came.body, came.headers["x-kvrelay-tenant"]) == ("/v1/completions", b'{"a": 1}', "a")


async def test_a_stream_goes_to_the_callback_piece_by_piece() -> None:
    goes_on = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.event(b"one")
        await goes_on.wait()
        await exchange.end_stream()

    pieces: list[bytes] = []

    def on_body(piece: bytes) -> None:
        pieces.append(piece)
        goes_on.set()  # The second piece is written only when the first one was seen.

    async with scripted_http(stream) as server, HttpPool(Origin.parse(server.url)) as pool:
        answer = await pool.exchange(request(pool), on_body)
    assert (answer.status, answer.body, b"".join(pieces)) == (200, b"", b"data: one\n\ndata: [DONE]\n\n")


async def test_connections_are_used_again_and_closed_with_the_pool() -> None:
    async with scripted_http(lambda exchange: exchange.answer(200, b"")) as server:
        async with HttpPool(Origin.parse(server.url)) as pool:
            for _ in range(3):
                await pool.exchange(request(pool))
            await asyncio.gather(*(pool.exchange(request(pool)) for _ in range(5)))
            await pool.exchange(request(pool))
        assert server.num_connections == 5
        await eventually(lambda: server.num_open == 0)


async def test_a_connection_that_the_server_closed_between_requests_is_replaced() -> None:
    async def answer_and_close(exchange: Exchange) -> None:
        if len(server.exchanges) > 1 and exchange.connection == 1:
            exchange.writer.transport.abort()
        else:
            await exchange.answer(200, b"")

    async with scripted_http(answer_and_close) as server, HttpPool(Origin.parse(server.url)) as pool:
        await pool.exchange(request(pool))
        assert (await pool.exchange(request(pool))).status == 200
    assert [exchange.connection for exchange in server.exchanges] == [1, 1, 2]


async def test_a_server_that_asks_to_close_gets_a_new_connection_next_time() -> None:
    async with scripted_http(lambda exchange: exchange.answer(200, b"", Connection="close")) as server:
        async with HttpPool(Origin.parse(server.url)) as pool:
            await pool.exchange(request(pool))
            await pool.exchange(request(pool))
        assert server.num_connections == 2


async def test_a_body_without_length_ends_with_its_connection() -> None:
    async def until_closed(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 500 x\r\n\r\nall of it")
        exchange.writer.close()

    async with scripted_http(until_closed) as server, HttpPool(Origin.parse(server.url)) as pool:
        assert (await pool.exchange(request(pool))).body == b"all of it"


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "in the middle of the answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "in the middle of the answer"),
        (b"", "before there was an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * (1 << 19), "headers of the answer are larger"),
    ],
)
async def test_what_is_no_complete_answer_is_an_error(sent: bytes, error: str) -> None:
    async def half(exchange: Exchange) -> None:
        await exchange.send(sent)
        exchange.writer.close()

    async with scripted_http(half) as server, HttpPool(Origin.parse(server.url)) as pool:
        with pytest.raises(HttpProtocolError, match=error):
            await pool.exchange(request(pool))


async def test_what_a_callback_raises_ends_the_exchange() -> None:
    def refuse(_: bytes) -> None:
        raise ValueError("not mine")

    async with scripted_http(_endless) as server, HttpPool(Origin.parse(server.url)) as pool:
        with pytest.raises(ValueError, match="not mine"):
            await pool.exchange(request(pool), refuse)
        await eventually(lambda: server.num_open == 0)


async def test_a_cancelled_exchange_closes_its_connection() -> None:
    began = asyncio.Event()
    async with scripted_http(_endless) as server, HttpPool(Origin.parse(server.url)) as pool:
        exchange = asyncio.ensure_future(pool.exchange(request(pool), lambda _: began.set()))
        await began.wait()
        exchange.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange
        await eventually(lambda: server.num_open == 0)


async def test_nobody_at_the_address_is_told_with_the_address() -> None:
    async with scripted_http(_endless) as server:
        origin = Origin.parse(server.url)
    async with HttpPool(origin) as pool:
        with pytest.raises(UnreachableServerError, match=f"nobody answers at {origin.url}"):
            await pool.exchange(request(pool))


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "path", "is_tls"),
    [
        ("http://a:8000", "a", 8000, "a:8000", "", False),
        ("http://a/", "a", 80, "a", "", False),
        ("https://a/api/v1/", "a", 443, "a", "/api", True),
        ("http://[::1]:9", "::1", 9, "[::1]:9", "", False),
        ("http://name:secret@a:1", "a", 1, "a:1", "", False),
    ],
)
def test_urls(url: str, host: str, port: int, authority: str, path: str, is_tls: bool) -> None:
    origin = Origin.parse(url)
    assert (origin.host, origin.port, origin.authority, origin.path, origin.is_tls) == (
        host,
        port,
        authority,
        path,
        is_tls,
    )
    assert "secret" not in origin.url


@pytest.mark.parametrize("url", ["a:8000", "ftp://a", "http://", "http://a:99999"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Origin.parse(url)


async def _endless(exchange: Exchange) -> None:
    await exchange.begin_stream()
    await exchange.event(b"one")
    await exchange.client_gone()
    exchange.writer.close()

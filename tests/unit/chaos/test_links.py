"""Links pass bytes on unchanged, unless they are told otherwise, and then do what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import pytest

from tests.chaos.links import Corruption, Delay, Link, Lossy, Partition, open_link
from tests.support.eventually import eventually

DATA = bytes(range(256)) * 1000


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def _link() -> AsyncIterator[Link]:
    """To a server that says everything again."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, open_link("echo", f"{host}:{port}") as link:
        yield link


class _Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes = DATA) -> bytes:
        self.writer.write(data)
        return await self.reader.readexactly(len(data))


@contextlib.asynccontextmanager
async def _client(link: Link) -> AsyncIterator[_Client]:
    reader, writer = await asyncio.open_connection(*link.address.split(":"))
    try:
        yield _Client(reader, writer)
    finally:
        writer.close()


async def test_everything_passes_until_the_client_leaves() -> None:
    async with _link() as link:
        async with _client(link) as one, _client(link) as other:
            assert await asyncio.gather(one.ask(), other.ask(DATA[7:])) == [DATA, DATA[7:]]
            assert len(link.connections) == 2
        await eventually(lambda: not link.connections)


async def test_a_partition_holds_bytes_and_connections_and_lets_them_go() -> None:
    async with _link() as link, _client(link) as client:
        await client.ask(b"before")
        harm = Partition()
        link.impose(harm)
        asking = asyncio.create_task(client.ask(b"held"))
        await asyncio.wait([asking], timeout=0.2)
        assert not asking.done()
        link.lift(harm)
        assert await asking == b"held"


async def test_a_partition_may_touch_some_connections_only() -> None:
    async with _link() as link, _client(link) as one, _client(link) as other:
        await one.ask(b"1")
        await other.ask(b"2")
        harm = Partition()
        harm.touches = lambda connection: connection.number == 1
        link.impose(harm)
        assert await other.ask() == DATA
        asking = asyncio.create_task(one.ask(b"held"))
        await asyncio.wait([asking], timeout=0.2)
        assert not asking.done()
        link.lift(harm)
        await asking


async def test_a_delay_is_added_each_way_and_costs_no_order() -> None:
    async with _link() as link, _client(link) as client:
        await client.ask(b"connected")
        link.impose(Delay(0.1))
        began_s = time.monotonic()
        assert await client.ask() == DATA
        assert 0.2 <= time.monotonic() - began_s < 5.0


async def test_lost_packets_come_late_and_in_order() -> None:
    async with _link() as link, _client(link) as client:
        link.impose(Lossy(random.Random(1), rate=0.5, retransmission_s=0.05))
        assert await client.ask() == DATA


async def test_single_bits_change_on_the_way_there() -> None:
    async with _link() as link, _client(link) as client:
        link.impose(Corruption(random.Random(1), rate=1.0))
        got = await client.ask()
        changed = [(a ^ b).bit_count() for a, b in zip(got, DATA, strict=True) if a != b]
        assert changed
        assert set(changed) == {1}
        assert len(changed) < 100


async def test_a_reset_breaks_what_there_is_and_not_what_comes() -> None:
    async with _link() as link:
        async with _client(link) as client:
            await client.ask()
            assert link.reset() == 1
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await client.ask()
        async with _client(link) as client:
            assert await client.ask() == DATA


async def test_nobody_listens_is_a_broken_connection() -> None:
    async with _link() as link:
        link.target = "127.0.0.1:1"
        async with _client(link) as client:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await client.ask()

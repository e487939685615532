"""A peer that falls silent while its connection stays open is taken for dead by both sides, also while data flows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvrelay import grpc_options
from kvrelay.etcd import transport
from tests.chaos.links import Partition, open_link

PROMISED_S = 15.0
"""`grpc_options.channel_options` says so; gRPC itself waits for a minute."""
_SILENT_S = 30.0


@contextlib.asynccontextmanager
async def _talker() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that sends all the time; the event tells that it has lost its client."""
    lost = asyncio.Event()

    async def talk(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
                await asyncio.sleep(0.002)
        finally:
            lost.set()

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(talk)
    server = grpc.aio.server(options=grpc_options.server_options())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Talk": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", lost
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "options", [grpc_options.channel_options(), transport._OPTIONS], ids=["among workers", "towards etcd"]
)
async def test_a_peer_that_falls_silent_is_noticed_although_data_was_flowing(options: Any) -> None:
    async with (
        _talker() as (target, lost),
        open_link("talk", target) as link,
        grpc.aio.insecure_channel(link.address, options=options) as channel,
    ):
        call = channel.stream_stream("/test/Talk")()
        for _ in range(200):
            await call.read()
        link.impose(Partition())
        began_s = time.monotonic()
        async with asyncio.timeout(_SILENT_S):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            await lost.wait()
        assert time.monotonic() - began_s < PROMISED_S

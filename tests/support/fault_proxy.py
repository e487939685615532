"""Stands between a sender of KV blocks and a receiver's push port: passes frames or bytes on, and does harm to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from kvrelay import grpc_options
from kvrelay.kv_transfer.wire import SERVICE
from tests.support.frame_faults import FrameFault

_MAX_STREAMS = 16
_STOP_S = 5.0
_CHUNK_BYTES = 64 << 10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FrameProxy:
    """A `Push` service that hands frames to the real one, each stream over a connection of its own."""

    def __init__(self, target: str, fault: FrameFault) -> None:
        self.num_frames = 0
        self._target = target
        self._fault = fault
        self._stopped = threading.Event()
        self._server: grpc.Server | None = None
        self._threads = ThreadPoolExecutor(_MAX_STREAMS, thread_name_prefix="proxy")

    def start(self) -> str:
        """Serve on a free port; returns the address."""
        self._server = grpc.server(self._threads, options=grpc_options.server_options())
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Push": grpc.stream_stream_rpc_method_handler(
                self._push, request_deserializer=bytes, response_serializer=bytes
            )
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        self._stopped.set()
        if self._server is not None:
            assert self._server.stop(None).wait(_STOP_S), "a stream goes on through the proxy"
            self._server = None
        self._threads.shutdown(wait=False)

    def _push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        options = grpc_options.channel_options(own_connection=True)
        with grpc.insecure_channel(self._target, options=options) as channel:
            push: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
                f"/{SERVICE}/Push", request_serializer=None, response_deserializer=None
            )
            calls: list[grpc.Call] = []
            call = push(self._forward(frames, calls))
            calls.append(call)
            context.add_callback(lambda: _cancel([call]))
            try:
                yield from call
            except grpc.RpcError:
                context.abort(call.code(), call.details())

    def _forward(self, frames: Iterator[bytes], calls: Sequence[grpc.Call]) -> Iterator[bytes]:
        try:
            for frame in frames:
                self.num_frames += 1
                yield from self._fault.frames(frame, self._stopped)
        except grpc.RpcError:  # The sender is gone, which must not look like the end of its frames.
            _cancel(calls)


def _cancel(calls: Sequence[grpc.Call]) -> None:
    for call in calls:
        call.cancel()


class TcpFault:
    """Strikes each connection again and again, after so many bytes from the sender. Does nothing by itself."""

    def __init__(self, rng: random.Random, bytes_between: tuple[int, int]) -> None:
        self.num_injected = 0
        self._rng = rng
        self._bytes_between = bytes_between

    def distance_bytes(self) -> int:
        """From one strike to the next."""
        return self._rng.randrange(*self._bytes_between)

    async def strike(self, link: TcpLink) -> None:
        """Does what it does."""
        self.num_injected += 1


class Stall(TcpFault):
    """Nothing goes on in any direction for a while, and the connection stays open."""

    def __init__(self, rng: random.Random, bytes_between: tuple[int, int], *, most_s: float) -> None:
        super().__init__(rng, bytes_between)
        self._most_s = most_s

    async def strike(self, link: TcpLink) -> None:
        await super().strike(link)
        link.may_pass.clear()
        try:
            await asyncio.sleep(self._rng.random() * self._most_s)
        finally:
            link.may_pass.set()


class Reset(TcpFault):
    """Both sides see a reset, in the middle of whatever was on its way."""

    async def strike(self, link: TcpLink) -> None:
        await super().strike(link)
        link.reset()


class Cut(TcpFault):
    """The receiver sees the end of the sender's bytes; the sender sees what the receiver makes of it."""

    async def strike(self, link: TcpLink) -> None:
        await super().strike(link)
        link.cut()


class TcpLink:
    """One connection through the proxy."""

    def __init__(self, to_sender: asyncio.StreamWriter, to_receiver: asyncio.StreamWriter) -> None:
        self.to_sender = to_sender
        self.to_receiver = to_receiver
        self.may_pass = asyncio.Event()
        self.may_pass.set()
        self._is_cut = False

    async def forward(self, data: bytes) -> None:
        """Towards the receiver, unless that way is cut."""
        if not self._is_cut:
            self.to_receiver.write(data)
            await self.to_receiver.drain()

    def cut(self) -> None:
        """Half-close the connection to the receiver."""
        self._is_cut = True
        if self.to_receiver.can_write_eof():
            self.to_receiver.write_eof()

    def reset(self) -> None:
        """Both connections at once, with RST."""
        for writer in (self.to_sender, self.to_receiver):
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    def close(self) -> None:
        for writer in (self.to_sender, self.to_receiver):
            writer.transport.abort()


class TcpProxy:
    """Passes bytes on to `target`. In the running event loop; see `tcp_proxy`."""

    def __init__(self, target: str, fault: TcpFault) -> None:
        self.num_connections = 0
        self._target = target
        self._fault = fault
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, from_sender: asyncio.StreamReader, to_sender: asyncio.StreamWriter) -> None:
        """One connection, until either side is gone."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.num_connections += 1
        host, port = self._target.rsplit(":", 1)
        try:
            from_receiver, to_receiver = await asyncio.open_connection(host, int(port))
            link = TcpLink(to_sender, to_receiver)
            try:
                await self._both_ways(link, from_sender, from_receiver)
            finally:
                link.close()
        except OSError:
            to_sender.transport.abort()
        finally:
            self._connections.discard(task)

    async def _both_ways(
        self, link: TcpLink, from_sender: asyncio.StreamReader, from_receiver: asyncio.StreamReader
    ) -> None:
        """What comes back ends it: a receiver that sees the end of the stream closes the connection."""
        forward = asyncio.create_task(self._forward(link, from_sender))
        back = asyncio.create_task(_back(link, from_receiver))
        try:
            await asyncio.wait([back, forward], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in (forward, back):
                pump.cancel()
                with contextlib.suppress(OSError, asyncio.CancelledError, RuntimeError):
                    await pump

    async def _forward(self, link: TcpLink, source: asyncio.StreamReader) -> None:
        distance = self._fault.distance_bytes()
        while data := await source.read(_CHUNK_BYTES):
            while len(data) > distance:
                await link.forward(data[:distance])
                data = data[distance:]
                await self._fault.strike(link)
                distance = self._fault.distance_bytes()
            distance -= len(data)
            await link.forward(data)

    async def end(self) -> None:
        """Close all connections."""
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


async def _back(link: TcpLink, source: asyncio.StreamReader) -> None:
    while data := await source.read(_CHUNK_BYTES):
        await link.may_pass.wait()
        link.to_sender.write(data)
        await link.to_sender.drain()


@contextlib.asynccontextmanager
async def tcp_proxy(target: str, fault: TcpFault) -> AsyncIterator[str]:
    """Run one; yields its address. No connection is left at the end."""
    proxy = TcpProxy(target, fault)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        await proxy.end()


@contextlib.asynccontextmanager
async def frame_proxy(target: str, fault: FrameFault) -> AsyncIterator[str]:
    """Run one; yields its address. No stream is left at the end."""
    proxy = FrameProxy(target, fault)
    try:
        yield proxy.start()
    finally:
        await asyncio.to_thread(proxy.stop)

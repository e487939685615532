"""gRPC without any message format, sync and asyncio: the best that a transport over it can hope for.

A job's blocks are messages that exist as `bytes` before the clock starts; the receiver puts each into its place in a
large region. One call for each repetition.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio

from bench.background_loop import BackgroundLoop
from bench.kv_side import Bytes, Job, Receiver, Sender, new_memory

_METHOD = "Push"
_SERVICE = "bench.Raw"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def _same(message: bytes) -> bytes:
    return message


class SyncSender(Sender):
    """A blocking stream-unary call."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=True))

    def connect(self, contact: str) -> None:
        self._channel = grpc.insecure_channel(contact, options=_OPTIONS)
        self._push = self._channel.stream_unary(
            f"/{_SERVICE}/{_METHOD}", request_serializer=_same, response_deserializer=_same
        )

    def send(self, job: Job) -> list[float]:
        messages = [block.tobytes() for block in self.blocks(job)]
        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            _check(self._push(iter(messages)), job)
            seconds.append(time.perf_counter() - began)
        return seconds


class AioSender(Sender):
    """An asyncio stream-unary call."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=True))
        self._loop = BackgroundLoop()

    def connect(self, contact: str) -> None:
        self._loop.run(self._open(contact))

    async def _open(self, contact: str) -> None:
        self._channel = grpc.aio.insecure_channel(contact, options=_OPTIONS)
        self._push = self._channel.stream_unary(
            f"/{_SERVICE}/{_METHOD}", request_serializer=_same, response_deserializer=_same
        )

    def send(self, job: Job) -> list[float]:
        return self._loop.run(self._send(job, [block.tobytes() for block in self.blocks(job)]))

    async def _send(self, job: Job, messages: list[bytes]) -> list[float]:
        async def all_messages() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            _check(await self._push(all_messages()), job)
            seconds.append(time.perf_counter() - began)
        return seconds


class SyncReceiver(Receiver):
    """A server with a pool of threads."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=False))
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_handlers(self._push),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def contact(self) -> str:
        return f"127.0.0.1:{self._port}"

    def receive(self, job: Job) -> None:
        """The server does it."""

    def _push(self, messages: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        place = _Place(self.memory)
        for message in messages:
            place.put(message)
        return str(place.position).encode()


class AioReceiver(Receiver):
    """An asyncio server."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=False))
        self._port = 0
        self._loop = BackgroundLoop()
        self._loop.run(self._start())

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_handlers(self._push),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    def contact(self) -> str:
        return f"127.0.0.1:{self._port}"

    def receive(self, job: Job) -> None:
        """The server does it."""

    async def _push(self, messages: AsyncIterator[bytes], _: Any) -> bytes:
        place = _Place(self.memory)
        async for message in messages:
            place.put(message)
        return str(place.position).encode()


class _Place:
    """Where the next message of a call goes."""

    def __init__(self, memory: Bytes) -> None:
        self._view = memory.data
        self.position = 0

    def put(self, message: bytes) -> None:
        end = self.position + len(message)
        self._view[self.position : end] = message
        self.position = end


def _handlers(push: Any) -> grpc.GenericRpcHandler:
    handler = grpc.stream_unary_rpc_method_handler(push, request_deserializer=_same, response_serializer=_same)
    return grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})


def _check(answer: bytes, job: Job) -> None:
    if int(answer) != job.num_bytes:
        raise ConnectionError(f"{int(answer)} bytes arrived of {job.num_bytes}")

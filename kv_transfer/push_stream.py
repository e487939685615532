"""How do frames leave without the event loop? Threads encode them and write them to streams of their own."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import grpc

from kvrelay import grpc_options
from kvrelay.kv_transfer.posting import post_to_running_loop, raise_in_loop
from kvrelay.kv_transfer.wire import SERVICE, FrameHeader, encode_frame
from kvrelay.v1 import kv_transfer_pb2

AckHandler = Callable[[kv_transfer_pb2.FrameAck | str], None]
"""Called in the event loop for every ack, and with the reason when a stream is broken."""

_IDLE_S = 10.0
"""A stream that nothing was sent over for so long is closed: it takes a thread of the receiver."""
_POLL_S = 0.5
_UNASKED_BYTES = 8 << 20
_UNASKED_S = 0.3
"""A frame asks for acks when nothing is queued behind it, when so much was sent since the last that did, or when that
was so long ago: an ack takes both sides some hundred microseconds."""
_ASK = encode_frame(FrameHeader(0, 0, 0, 0, 0, ack_now=1), ())
_LAST = {
    "Push": encode_frame(FrameHeader(0, 0, 0, 0, 0, is_last=1), ()),
    "Copy": kv_transfer_pb2.LocalRun(is_last=True).SerializeToString(),
}
"""What ends a stream in order, by method."""
_JOIN_S = 2.0


SentHandler = Callable[[int, float], None]
"""Bytes of a message, and for how many seconds it kept gRPC busy."""


def ignore_sent(_num_bytes: int, _seconds: float) -> None:
    """A `SentHandler` for who does not ask."""


class Outgoing(Protocol):
    """Something to send."""

    @property
    def num_bytes(self) -> int:
        """What it brings to the receiver."""

    def encode(self, *, ack_now: bool) -> bytes | None:
        """The message, made by the thread that sends it; None when it is not to be sent any more."""


class PushStreams:
    """Several streams to one receiver, each over a connection of its own; whichever is free takes the next frame.

    What is queued here are orders, not bytes: each stream holds one frame (`MAX_PAYLOAD_BYTES`, or one layer of one
    block if that is larger), and gRPC a copy of it: some 10 MiB for a stream, whether its receiver reads or not.
    """

    def __init__(
        self,
        address: str,
        method: str,
        num_streams: int,
        on_ack: AckHandler,
        on_sent: SentHandler = ignore_sent,
    ) -> None:
        """`method`: "Push" or "Copy"; the orders fit it. `on_ack` is called in the event loop that runs now.

        `on_sent` is told by the sending threads of each message: its bytes, and how many seconds it kept gRPC busy.
        """
        self._on_sent = on_sent
        self.address = address
        self._method = method
        self._on_ack = on_ack
        self._post = post_to_running_loop(raise_in_loop)
        self._orders: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._closing = False
        self._calls: set[grpc.Call] = set()
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-{method}-{address}-{i}", daemon=True)
            for i in range(num_streams)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, order: Outgoing) -> None:
        """Send it as soon as a stream is free."""
        self._orders.put(order)

    async def close(self) -> None:
        """End the streams and wait for their threads."""
        self._closing = True
        for call in list(self._calls):
            call.cancel()
        for _ in self._threads:
            self._orders.put(None)
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _run(self) -> None:
        """One thread: a stream at a time, while there is something to send."""
        with grpc.insecure_channel(self.address, options=grpc_options.channel_options(own_connection=True)) as channel:
            push: grpc.StreamStreamMultiCallable[bytes, kv_transfer_pb2.FrameAcks] = channel.stream_stream(
                f"/{SERVICE}/{self._method}",
                request_serializer=None,
                response_deserializer=kv_transfer_pb2.FrameAcks.FromString,
            )
            while (order := self._orders.get()) is not None and not self._closing:
                stream = _Stream(self._orders, order, self._on_sent, self._method)
                call = push(stream.frames())
                self._calls.add(call)
                if self._closing:  # `close` may have looked at the calls already.
                    call.cancel()
                error = self._read(call)
                stream.over = True
                self._calls.discard(call)
                if error:
                    self._post(self._on_ack, error)

    def _read(self, call: Iterator[kv_transfer_pb2.FrameAcks]) -> str:
        """Pass acks on until the stream ends; returns why it broke, or nothing."""
        try:
            for acks in call:
                self._post(self._on_acks, acks)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        return ""

    def _on_acks(self, acks: kv_transfer_pb2.FrameAcks) -> None:
        for ack in acks.acks:
            self._on_ack(ack)


class _Stream:
    """The frames of one call, for gRPC's thread that consumes them."""

    def __init__(
        self,
        orders: queue.SimpleQueue[Outgoing | None],
        first: Outgoing,
        on_sent: SentHandler,
        method: str,
    ) -> None:
        """`method`: "Push", whose acks come only when a frame asks, or "Copy"."""
        self._orders = orders
        self._first = first
        self._on_sent = on_sent
        self._must_ask = method == "Push"
        self._last = _LAST[method]
        self._unasked_bytes = 0
        self._asked_s = time.monotonic()
        self.over = False
        """Whether the call has ended; gRPC's thread may still wait for the next frame then."""

    def frames(self) -> Iterator[bytes]:
        """What the stream says, until it was idle for long or is over."""
        order: Outgoing | None = self._first
        while order is not None:
            asks = self._asks(order)
            frame = order.encode(ack_now=asks)
            if frame is not None:
                self._count(order, asks=asks)
                began = time.monotonic()
                yield frame
                self._on_sent(len(frame), time.monotonic() - began)
            try:
                order = self._mine(self._orders.get_nowait())
            except queue.Empty:  # Another stream may have taken what was queued behind.
                if self._must_ask and self._unasked_bytes:
                    self._unasked_bytes = 0
                    yield _ASK
                order = self._next()
        yield self._last

    def _asks(self, order: Outgoing) -> bool:
        if self._unasked_bytes + order.num_bytes >= _UNASKED_BYTES or self._orders.empty():
            return True
        return time.monotonic() - self._asked_s >= _UNASKED_S

    def _count(self, order: Outgoing, *, asks: bool) -> None:
        """The order's frame is sent; one that is not wanted any more asks for nothing."""
        if asks:
            self._unasked_bytes = 0
            self._asked_s = time.monotonic()
        else:
            self._unasked_bytes += order.num_bytes

    def _next(self) -> Outgoing | None:
        """The next order, or None when the stream shall end."""
        waited_s = 0.0
        while not self.over and waited_s < _IDLE_S:
            try:
                order = self._orders.get(timeout=_POLL_S)
            except queue.Empty:
                waited_s += _POLL_S
                continue
            return self._mine(order)
        return None

    def _mine(self, order: Outgoing | None) -> Outgoing | None:
        """The order; None, with the order given back, when it is for a stream that lives or for the thread."""
        if self.over or order is None:
            self._orders.put(order)
            return None
        return order

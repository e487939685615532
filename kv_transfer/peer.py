"""How do frames reach one other worker? Over a channel and a long-lived push stream of their own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import grpc

from kvrelay import grpc_options
from kvrelay.kv_transfer.service import SERVICE
from kvrelay.v1 import kv_transfer_pb2

AckHandler = Callable[[kv_transfer_pb2.FrameAck | None], None]
"""Called for every ack of one transfer, and with None when the stream is broken."""

_PushCall = grpc.aio.StreamStreamCall[bytes, kv_transfer_pb2.FrameAck]

_RPC_TIMEOUT_S = 10.0
_IDLE_S = 300.0


class PeerError(ConnectionError):
    """The peer cannot be reached, or the stream to it broke."""


class LayoutRefusedError(RuntimeError):
    """The peer's KV cache has another layout; its message prints both."""


class Peer:
    """The sender's end of everything between two workers. Many transfers share it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc_options.open_channel(address, own_connection=True)
        self._offer = self._channel.unary_unary(
            f"/{SERVICE}/Offer",
            request_serializer=kv_transfer_pb2.OfferRequest.SerializeToString,
            response_deserializer=kv_transfer_pb2.Want.FromString,
        )
        self._commit = self._channel.unary_unary(
            f"/{SERVICE}/Commit",
            request_serializer=kv_transfer_pb2.CommitRequest.SerializeToString,
            response_deserializer=kv_transfer_pb2.CommitResponse.FromString,
        )
        self._push = self._channel.stream_stream(
            f"/{SERVICE}/Push",
            request_serializer=_as_it_is,
            response_deserializer=kv_transfer_pb2.FrameAck.FromString,
        )
        self._frames: asyncio.Queue[bytes] = asyncio.Queue(maxsize=2)
        self._handlers: dict[int, AckHandler] = {}

    async def offer(self, request: kv_transfer_pb2.OfferRequest) -> kv_transfer_pb2.Want:
        """Raises `PeerError` and `LayoutRefusedError`."""
        try:
            return await self._offer(request, timeout=_RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise LayoutRefusedError(error.details()) from error
            raise PeerError(f"offer to {self.address}: {error.code().name}: {error.details()}") from error

    async def commit(self, transfer_id: int) -> int:
        """Returns how many wanted blocks did not arrive. Raises `PeerError`."""
        try:
            reply = await self._commit(kv_transfer_pb2.CommitRequest(transfer_id=transfer_id), timeout=_RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise PeerError(f"commit to {self.address}: {error.code().name}: {error.details()}") from error
        return reply.num_missing_blocks

    @contextlib.contextmanager
    def acks(self, transfer_id: int, handler: AckHandler) -> Iterator[None]:
        """Within it `handler` gets the transfer's acks."""
        self._handlers[transfer_id] = handler
        try:
            yield
        finally:
            del self._handlers[transfer_id]

    @property
    def num_transfers(self) -> int:
        return len(self._handlers)

    async def send(self, frame: bytes) -> None:
        """Queue a frame; waits while the peer is slower than we are."""
        await self._frames.put(frame)

    async def run(self) -> None:
        """Keep the push stream while there is something to push; ends by cancellation only."""
        while True:
            frame = await self._frames.get()
            call = self._push()
            try:
                async with asyncio.TaskGroup() as tasks:
                    writing = tasks.create_task(self._write(call, frame))
                    await self._read(call)
                    writing.cancel()
            finally:
                call.cancel()
                self._broken()

    async def _read(self, call: _PushCall) -> None:
        """Deliver acks until the stream ends or breaks."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for ack in call:
                handler = self._handlers.get(ack.transfer_id)
                if handler is not None:
                    handler(ack)

    async def _write(self, call: _PushCall, frame: bytes) -> None:
        """Frames are taken from the queue for a living stream only: gRPC's own consumer would outlive it.

        A stream that is over says so to `_read`, too.
        """
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(frame)
                frame = await self._frames.get()

    def _broken(self) -> None:
        while not self._frames.empty():
            self._frames.get_nowait()
        for handler in list(self._handlers.values()):
            handler(None)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class Peers:
    """The peers of one worker, made on demand, each with its running task."""

    def __init__(self, tasks: asyncio.TaskGroup, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tasks = tasks
        self._clock = clock
        self._peers: dict[str, tuple[Peer, asyncio.Task[None]]] = {}
        self._used_s: dict[str, float] = {}

    def get(self, address: str) -> Peer:
        """The peer at `host:port`."""
        known = self._peers.get(address)
        self._used_s[address] = self._clock()
        if known is None:
            peer = Peer(address)
            known = self._peers[address] = peer, self._tasks.create_task(peer.run(), name=f"push-{address}")
        return known[0]

    @property
    def num_transfers(self) -> int:
        return sum(peer.num_transfers for peer, _ in self._peers.values())

    async def expire(self) -> None:
        """Close what nobody has used for a while: workers come and go, and each comes at another address."""
        latest_s = self._clock() - _IDLE_S
        for address, (peer, _) in list(self._peers.items()):
            if not peer.num_transfers and self._used_s[address] < latest_s:
                await self._close(address)

    async def close(self) -> None:
        """End all streams and channels."""
        for address in list(self._peers):
            await self._close(address)

    async def _close(self, address: str) -> None:
        peer, task = self._peers.pop(address)
        del self._used_s[address]
        task.cancel()
        await peer.close()


def _as_it_is(frame: bytes) -> bytes:
    return frame

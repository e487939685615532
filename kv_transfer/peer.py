"""How does a worker reach one other worker? Offers over a channel, frames over streams of threads."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, cast

import grpc
import structlog

from kvrelay import grpc_options
from kvrelay.kv_transfer.collecting import Collecting
from kvrelay.kv_transfer.collective_group import RUN_BYTES
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.frame_order import FrameOrder
from kvrelay.kv_transfer.link_coder import LinkCoder
from kvrelay.kv_transfer.push_stream import AckHandler, PushStreams, ignore_sent
from kvrelay.kv_transfer.wire import FRAME_BYTES, SERVICE
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2

_log = structlog.get_logger(__name__)

DEFAULT_STREAMS = 2
"""To each peer. More were not faster on two cores; one leaves a core idle while it waits."""

_RPC_TIMEOUT_S = 10.0
_IDLE_S = 300.0


_ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")
"""What a peer may name to be dialled: no other scheme of gRPC's."""

_OfferCall: TypeAlias = "grpc.aio.UnaryStreamCall[kv_transfer_pb2.OfferRequest, kv_transfer_pb2.Want]"

_Way = tuple[str, str]
"""Push address and method: what streams are for."""


@dataclass(slots=True)
class _Listener:
    """Of one transfer's acks."""

    handler: AckHandler
    ways: set[_Way] = field(default_factory=set)
    transports: dict[str, None] = field(default_factory=dict)
    """Those used, in the order of their first use."""


class PeerError(ConnectionError):
    """The peer cannot be reached, or the stream to it broke."""


class LayoutRefusedError(RuntimeError):
    """The peer's KV cache has another layout; its message prints both."""


class Peer:
    """The sender's end of everything between two workers. Many transfers share it. Made in a running event loop."""

    def __init__(
        self,
        address: str,
        layout: cluster_pb2.KvLayout,
        compression: Compression = Compression.NONE,
        *,
        num_streams: int = DEFAULT_STREAMS,
        collectives: Collectives | None = None,
        counters: Counter[str] | None = None,
    ) -> None:
        """`collectives`: of the worker. `counters` get the bytes sent by each transport."""
        self.address = address
        self.coder = LinkCoder(compression, layout, num_streams)
        self._counters: Counter[str] = Counter() if counters is None else counters
        self.collecting = Collecting(collectives or Collectives(), self._counters, self._hand_on, self._push)
        self._num_streams = num_streams
        self._channel = grpc_options.open_channel(address, own_connection=True)
        self._offer = self._channel.unary_stream(
            f"/{SERVICE}/Offer",
            request_serializer=kv_transfer_pb2.OfferRequest.SerializeToString,
            response_deserializer=kv_transfer_pb2.Want.FromString,
        )
        self._commit = self._channel.unary_unary(
            f"/{SERVICE}/Commit",
            request_serializer=kv_transfer_pb2.CommitRequest.SerializeToString,
            response_deserializer=kv_transfer_pb2.CommitResponse.FromString,
        )
        self._fetch = self._channel.unary_unary(
            f"/{SERVICE}/Fetch",
            request_serializer=kv_transfer_pb2.FetchRequest.SerializeToString,
            response_deserializer=kv_transfer_pb2.FetchResponse.FromString,
        )
        self._streams: dict[_Way, PushStreams] = {}
        self._listeners: dict[int, _Listener] = {}
        self._ack_s = time.monotonic()
        self._told: set[str] = set()

    @contextlib.asynccontextmanager
    async def offered(self, request: kv_transfer_pb2.OfferRequest) -> AsyncIterator[kv_transfer_pb2.Want]:
        """What the peer wants of an offer. Leaving this without a `commit` before frees what it has reserved.

        Raises `PeerError` and `LayoutRefusedError`.
        """
        del request.collective[:]
        request.collective.extend(self.collecting.offered())
        call = cast("_OfferCall", self._offer(request))
        try:
            yield await self._wanted(call)
        finally:
            call.cancel()

    async def _wanted(self, call: _OfferCall) -> kv_transfer_pb2.Want:
        try:
            async with asyncio.timeout(_RPC_TIMEOUT_S):
                want = await call.read()
        except TimeoutError as error:
            raise PeerError(f"offer to {self.address}: no answer within {_RPC_TIMEOUT_S:g} s") from error
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise LayoutRefusedError(error.details()) from error
            raise PeerError(f"offer to {self.address}: {error.code().name}: {error.details()}") from error
        if not isinstance(want, kv_transfer_pb2.Want):
            raise PeerError(f"offer to {self.address}: no answer")
        if not _ADDRESS.fullmatch(want.push_address):
            raise PeerError(f"{self.address} names {want.push_address!r} for its blocks, which is not host:port")
        for way in [way for way in self._streams if way[0] != want.push_address]:
            if streams := self._streams.pop(way, None):  # Another offer may have come first.
                await streams.close()
        await self.collecting.follow(want)
        return want

    async def commit(self, transfer_id: int) -> int:
        """Returns how many wanted blocks did not arrive. Raises `PeerError`."""
        try:
            reply = await self._commit(kv_transfer_pb2.CommitRequest(transfer_id=transfer_id), timeout=_RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise PeerError(f"commit to {self.address}: {error.code().name}: {error.details()}") from error
        return reply.num_missing_blocks

    async def fetch(self, request: kv_transfer_pb2.FetchRequest) -> int:
        """Ask for a prefix; returns how many blocks of it are coming. Raises `PeerError`."""
        try:
            reply = await self._fetch(request, timeout=_RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise PeerError(f"fetch from {self.address}: {error.code().name}: {error.details()}") from error
        return reply.num_blocks

    @contextlib.contextmanager
    def acks(self, want: kv_transfer_pb2.Want, handler: AckHandler) -> Iterator[Collection[str]]:
        """Within it `handler` gets the transfer's acks; gives the names of the transports used so far.

        Raises `PeerError` for an id that the peer has given to another transfer.
        """
        if want.transfer_id in self._listeners:
            raise PeerError(f"{self.address} gave two transfers the id {want.transfer_id}")
        listener = self._listeners[want.transfer_id] = _Listener(handler)
        try:
            yield listener.transports.keys()
        finally:
            del self._listeners[want.transfer_id]

    @property
    def num_transfers(self) -> int:
        return len(self._listeners)

    def frame_bytes(self, want: kv_transfer_pb2.Want) -> int:
        """Of how many bytes an order is best."""
        return RUN_BYTES if self.collecting.takes(want) else FRAME_BYTES

    def send(self, want: kv_transfer_pb2.Want, order: FrameOrder) -> None:
        """Have it sent the way that the answer to the offer says."""
        if self.collecting.takes(want):
            self._note(want, order, self.collecting.name)
            self.collecting.put(want, order)
        else:
            self._push(want, order)

    def _push(self, want: kv_transfer_pb2.Want, order: FrameOrder) -> None:
        way = want.push_address, "Copy" if want.local else "Push"
        listener = self._note(want, order, "shm" if want.local else "grpc")
        if listener is not None:
            listener.ways.add(way)
        on_sent = ignore_sent if want.local else self.coder.sent
        if way not in self._streams:
            self._streams[way] = PushStreams(*way, self._num_streams, partial(self._on_ack, way), on_sent)
        self._streams[way].put(order)

    def _note(self, want: kv_transfer_pb2.Want, order: FrameOrder, transport: str) -> _Listener | None:
        if transport not in self._told:
            self._told.add(transport)
            _log.info("KV blocks go", address=self.address, transport=transport)
        self._counters[f"bytes_pushed_{transport}"] += order.num_bytes
        listener = self._listeners.get(want.transfer_id)
        if listener is not None:
            listener.transports[transport] = None
        return listener

    def _on_ack(self, way: _Way, ack: kv_transfer_pb2.FrameAck | str) -> None:
        if not isinstance(ack, str):
            self._hand_on(ack)
            return
        for listener in list(self._listeners.values()):
            if way in listener.ways:
                listener.handler(ack)

    @property
    def quiet_s(self) -> float:
        """How long no ack has come, of any transfer."""
        return time.monotonic() - self._ack_s

    def _hand_on(self, ack: kv_transfer_pb2.FrameAck) -> None:
        self._ack_s = time.monotonic()
        listener = self._listeners.get(ack.transfer_id)
        if listener is not None:
            listener.handler(ack)

    async def close(self) -> None:
        """Close group, streams and channel."""
        await self.collecting.close()
        for streams in self._streams.values():
            await streams.close()
        self._streams.clear()
        await self._channel.close()


class Peers:
    """The peers of one worker, made on demand."""

    def __init__(
        self,
        layout: cluster_pb2.KvLayout,
        compression: Compression = Compression.NONE,
        *,
        collectives: Collectives | None = None,
        counters: Counter[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`layout`: of the blocks that are sent. `collectives` and `counters` as `Peer` takes them."""
        self._layout = layout
        self._compression = compression
        self._collectives = collectives
        self._counters = counters
        self._clock = clock
        self._peers: dict[str, Peer] = {}
        self._used_s: dict[str, float] = {}

    def get(self, address: str) -> Peer:
        """The peer at `host:port`. Raises `PeerError` for an address that is none."""
        if not _ADDRESS.fullmatch(address):
            raise PeerError(f"{address!r} is not host:port")
        self._used_s[address] = self._clock()
        if address not in self._peers:
            self._peers[address] = Peer(
                address, self._layout, self._compression, collectives=self._collectives, counters=self._counters
            )
        return self._peers[address]

    @property
    def num_transfers(self) -> int:
        return sum(peer.num_transfers for peer in self._peers.values())

    async def expire(self) -> None:
        """Close what nobody has used for a while: workers come and go, and each comes at another address."""
        latest_s = self._clock() - _IDLE_S
        for address, peer in list(self._peers.items()):
            if not peer.num_transfers and self._used_s.get(address, latest_s) < latest_s:
                await self._close(address)

    async def close(self) -> None:
        """End all streams and channels."""
        for address in list(self._peers):
            await self._close(address)

    async def _close(self, address: str) -> None:
        del self._used_s[address]
        await self._peers.pop(address).close()

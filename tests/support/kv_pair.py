"""Two host block stores in one process, with real gRPC between a sender and a receiver."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc.aio

from kvrelay.block_hash import layout_fingerprint
from kvrelay.grpc_options import server_options
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.link_coder import accepted
from kvrelay.kv_transfer.peer import Peer, Peers
from kvrelay.kv_transfer.posting import post_to_running_loop, raise_in_loop
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.kv_transfer.sender import Push
from kvrelay.kv_transfer.service import KvTransferService, add_to_server
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2

LAYERS = 4
SLOT_BYTES = 256 << 10
NUM_SLOTS = 64


def make_layout(model: str = "model") -> cluster_pb2.KvLayout:
    layout = cluster_pb2.KvLayout(
        model=model, dtype="bfloat16", num_layers=LAYERS, num_kv_heads=2, head_elements=1024, block_size_tokens=16
    )
    layout.fingerprint = layout_fingerprint(layout)
    return layout


def block_name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def block_bytes(number: int) -> bytes:
    """Content of block `number`; no two blocks share a byte position's value for long."""
    return b"".join((number * 65_537 + i * 257).to_bytes(8, "little") for i in range(32)) * (SLOT_BYTES // 256)


class Side:
    """A store, its segment and its receiver."""

    def __init__(
        self,
        num_slots: int = NUM_SLOTS,
        layout: cluster_pb2.KvLayout | None = None,
        compression: Compression = Compression.NONE,
    ) -> None:
        self.layout = layout or make_layout()
        self.segment = Segment.create(size_for(num_slots, SLOT_BYTES))
        self.segment.configure(SLOT_BYTES)
        self.store = BlockStore(num_slots, on_taken=self.segment.begin_generation)
        self.receiver = Receiver(
            self.store,
            self.segment,
            FrameDecoder(self.layout, accepted(compression, self.layout)),
            post=post_to_running_loop(raise_in_loop),
        )

    def put(self, numbers: Sequence[int]) -> list[int]:
        """Store blocks; their slots are pinned once."""
        slots = []
        for number in numbers:
            [slot] = self.store.reserve(1)
            self.segment.slot_view(slot)[:] = block_bytes(number)
            slots.append(self.store.commit(slot, block_name(number)))
        return slots

    def holds(self, number: int) -> bool:
        """Whether the block is there; its content must be right then."""
        slot = self.store.find(block_name(number))
        if slot is None:
            return False
        assert bytes(self.segment.slot_view(slot)) == block_bytes(number), f"block {number} has another content"
        return True

    def assert_idle(self) -> None:
        """Nothing is reserved, pinned or in transfer."""
        usage = self.store.usage()
        assert (usage.num_reserved, usage.num_pinned, self.receiver.num_transfers) == (0, 0, 0)


@contextlib.contextmanager
def side(
    num_slots: int = NUM_SLOTS,
    layout: cluster_pb2.KvLayout | None = None,
    compression: Compression = Compression.NONE,
) -> Iterator[Side]:
    """A side that must be idle at the end."""
    made = Side(num_slots, layout, compression)
    try:
        yield made
        made.assert_idle()
    finally:
        made.segment.close()


def push_of(sender: Side, peer: Peer, request_id: str, numbers: Sequence[int], *, local: bool = False) -> Push:
    """A push of these blocks, none of them ready yet; with `local` the peer may copy them from our memory."""
    offer = kv_transfer_pb2.OfferRequest(
        request_id=request_id,
        layout=sender.layout,
        block_hashes=b"".join(map(block_name, numbers)),
    )
    if local:
        offer.local.path, offer.local.proof = sender.segment.path, sender.segment.proof
    return Push(lambda: peer, sender.segment, offer, sender.store)


def whole(block: int, slot: int) -> BlockPart:
    """All layers of a block."""
    return BlockPart(block, slot, 0, LAYERS)


class KvServer:
    """A KvTransfer service; can be stopped and started again on the same ports."""

    def __init__(
        self,
        receiver: Receiver,
        push_server: type[PushServer] = PushServer,
        collectives: Collectives | None = None,
    ) -> None:
        self.address = ""
        self._receiver = receiver
        self._push_server_type = push_server
        self._collectives = collectives
        self._port = self._push_port = 0
        self._server: grpc.aio.Server | None = None
        self._push_server: PushServer | None = None

    async def start(self) -> None:
        self._push_server = self._push_server_type(self._receiver, self._collectives)
        self._push_port = self._push_server.start(f"127.0.0.1:{self._push_port}")
        self._server = grpc.aio.server(options=server_options())
        if self._collectives is not None:
            self._collectives.listen("127.0.0.1", "127.0.0.1")
        service = KvTransferService(self._receiver, self.push_address, lambda _: 0, collectives=self._collectives)
        add_to_server(service, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.address = f"127.0.0.1:{self._port}"
        await self._server.start()

    @property
    def push_address(self) -> str:
        return f"127.0.0.1:{self._push_port}"

    async def stop(self) -> None:
        if self._server is not None and self._push_server is not None:
            await self._server.stop(None)
            if self._collectives is not None:
                await asyncio.to_thread(self._collectives.close)
            await asyncio.to_thread(self._push_server.stop)
            self._server = self._push_server = None


@contextlib.asynccontextmanager
async def kv_server(
    receiver: Receiver, push_server: type[PushServer] = PushServer, collectives: Collectives | None = None
) -> AsyncIterator[KvServer]:
    """Serve until the end of the block."""
    server = KvServer(receiver, push_server, collectives)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def open_peers(
    compression: Compression = Compression.NONE,
    *,
    collectives: Collectives | None = None,
    counters: Counter[str] | None = None,
) -> AsyncIterator[Peers]:
    peers = Peers(make_layout(), compression, collectives=collectives, counters=counters)
    try:
        yield peers
    finally:
        await peers.close()

"""Our own transports, end to end: from one worker's host block store into another's, with offer, checksums, commit.

Each block size is another layout, so it has a store and a server of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import grpc.aio
import numpy as np

from bench.background_loop import BackgroundLoop
from bench.kv_side import BLOCKS, LATENCY_BYTES, Bytes, Job, Receiver, Sender, block_bytes, new_memory
from kvrelay.block_hash import layout_fingerprint
from kvrelay.grpc_options import server_options
from kvrelay.kv_transfer import receiver as kv_receiver
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.collectives import Collectives, usable_backends
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.peer import Peers
from kvrelay.kv_transfer.posting import post_to_running_loop, raise_in_loop
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.kv_transfer.sender import Push
from kvrelay.kv_transfer.service import KvTransferService, add_to_server
from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2

_TIMEOUT_S = 60.0
_SHAPES = {block_bytes(shape): shape for shape in (*BLOCKS.values(), (4, 1, 16, 512))}
assert LATENCY_BYTES in _SHAPES


def _layout(size: int) -> cluster_pb2.KvLayout:
    layers, heads, tokens, elements = _SHAPES[size]
    layout = cluster_pb2.KvLayout(
        model="bench",
        dtype="bfloat16",
        num_layers=layers,
        num_kv_heads=heads,
        head_elements=elements,
        block_size_tokens=tokens,
    )
    layout.fingerprint = layout_fingerprint(layout)
    return layout


def new_segment(num_bytes: int, size: int) -> Segment:
    """Room for `num_bytes` in slots of `size` bytes."""
    segment = Segment.create(size_for(num_bytes // size, size))
    segment.configure(size)
    return segment


class OurSender(Sender):
    """The blocks are ready when the push begins.

    `transport`: grpc, shm when the receiver may map our memory, or gloo_ours for a process group, made before.
    """

    def __init__(self, num_bytes: int, transport: str) -> None:
        super().__init__(new_memory(0, random=False))
        self._num_bytes = num_bytes
        self._transport = transport
        self._stores: dict[int, tuple[Segment, BlockStore]] = {}
        self._addresses: dict[str, str] = {}
        self._loop = BackgroundLoop()

    def connect(self, contact: str) -> None:
        self._addresses = json.loads(contact)
        self._loop.run(self._open())

    async def _open(self) -> None:
        self._peers = Peers(_layout(LATENCY_BYTES), collectives=_collectives(self._transport))

    def prepare(self, job: Job) -> None:
        if job.block_bytes not in self._stores:
            segment = new_segment(self._num_bytes, job.block_bytes)
            slots = np.frombuffer(segment.slots, np.uint8)
            slots[:] = new_memory(slots.nbytes, random=True)
            store = BlockStore(segment.num_slots, on_taken=segment.begin_generation)
            for slot in store.reserve(segment.num_slots):
                store.commit(slot, _name(0, 0, slot))
            self._stores[job.block_bytes] = segment, store
        self.memory = np.frombuffer(self._stores[job.block_bytes][0].slots, np.uint8)
        if self._transport == "gloo_ours":
            self._loop.run(self._meet(job.block_bytes))

    async def _meet(self, size: int) -> None:
        """Offer a block that does not come: the group is made meanwhile."""
        peer = self._peers.get(self._addresses[str(size)])
        offer = kv_transfer_pb2.OfferRequest(request_id="meet", layout=_layout(size), block_hashes=b"\xff" * 16)
        async with peer.offered(offer) as want:
            await peer.commit(want.transfer_id)
        async with asyncio.timeout(_TIMEOUT_S):
            while not peer.collecting.is_ready:  # noqa: ASYNC110 - not measured
                await asyncio.sleep(0.01)

    def send(self, job: Job) -> list[float]:
        return self._loop.run(self._send(job))

    async def _send(self, job: Job) -> list[float]:
        peer = self._peers.get(self._addresses[str(job.block_bytes)])
        segment, store = self._stores[job.block_bytes]
        seconds = []
        for repetition in range(job.repeat):
            offer = kv_transfer_pb2.OfferRequest(
                request_id=_request_id(job, repetition),
                layout=_layout(job.block_bytes),
                block_hashes=b"".join(_name(job.stamp, repetition, i) for i in range(job.num_blocks)),
            )
            if self._transport == "shm":
                offer.local.path, offer.local.proof = segment.path, segment.proof
            store.pin(range(job.num_blocks))
            began = time.perf_counter()
            push = Push(lambda: peer, segment, offer, store)
            for block in range(job.num_blocks):
                push.add(BlockPart(block, block, 0, offer.layout.num_layers))
            push.finish()
            result = await push.run()
            seconds.append(time.perf_counter() - began)
            if self._transport == "gloo_ours" and result.transport != "gloo":
                raise ConnectionError(f"blocks went by {result.transport}")
            if result.error or result.num_blocks != job.num_blocks:
                raise ConnectionError(f"{result.num_blocks} blocks arrived of {job.num_blocks}; {result.error}")
        return seconds


class OurReceiver(Receiver):
    """Lets go of each transfer when it is complete, so that the next one takes its slots. `transport`: the sender's."""

    def __init__(self, num_bytes: int, transport: str) -> None:
        super().__init__(new_memory(0, random=False))
        self._num_bytes = num_bytes
        self._transport = transport
        self._sides: dict[int, ReceivingSide] = {}
        self._loop = BackgroundLoop()
        self._loop.run(self._serve())

    async def _serve(self) -> None:
        for size in _SHAPES:
            self._sides[size] = side = ReceivingSide(self._num_bytes, size, _collectives(self._transport))
            await side.serve()

    def contact(self) -> str:
        return json.dumps({size: side.address for size, side in self._sides.items()})

    def receive(self, job: Job) -> None:
        self._loop.run(self._receive(job))

    async def _receive(self, job: Job) -> None:
        receiver = self._sides[job.block_bytes].receiver
        for repetition in range(job.repeat):
            if await receiver.wait_settled(_request_id(job, repetition), _TIMEOUT_S) is None:
                raise TimeoutError(f"no transfer within {_TIMEOUT_S:.0f} s")
            receiver.let_go(_request_id(job, repetition))

    def blocks(self, job: Job) -> Iterator[Bytes]:
        """Of the last repetition, wherever they lie."""
        side = self._sides[job.block_bytes]
        for block in range(job.num_blocks):
            slot = side.store.find(_name(job.stamp, job.repeat - 1, block))
            assert slot is not None, f"block {block} is not there"
            yield np.frombuffer(side.segment.slot_view(slot), np.uint8)


class ReceivingSide:
    """What a worker receives with: store, receiver, servers. All in the running event loop."""

    def __init__(self, num_bytes: int, size: int, collectives: Collectives) -> None:
        self._collectives = collectives
        self.segment = new_segment(num_bytes, size)
        np.frombuffer(self.segment.slots, np.uint8)[:] = 0
        self.store = BlockStore(self.segment.num_slots, on_taken=self.segment.begin_generation)
        self.receiver = kv_receiver.Receiver(
            self.store, self.segment, FrameDecoder(_layout(size), ()), post=post_to_running_loop(raise_in_loop)
        )
        self.address = ""

    async def serve(self) -> None:
        self._push_server = PushServer(self.receiver, self._collectives)
        push_port = self._push_server.start("127.0.0.1:0")
        self._server = grpc.aio.server(options=server_options())
        self._collectives.listen("127.0.0.1", "127.0.0.1")
        service = KvTransferService(self.receiver, f"127.0.0.1:{push_port}", lambda _: 0, collectives=self._collectives)
        add_to_server(service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()


def _collectives(transport: str) -> Collectives:
    return Collectives(usable_backends(KvTransport.COLLECTIVE) if transport == "gloo_ours" else ())


def _request_id(job: Job, repetition: int) -> str:
    return f"{job.stamp}-{job.block_bytes}-{repetition}"


def _name(stamp: int, repetition: int, block: int) -> bytes:
    """No block has the name of another one, so every one is wanted."""
    return b"".join(number.to_bytes(size, "big") for number, size in ((stamp, 4), (repetition, 4), (block, 8)))

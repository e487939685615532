"""A receiver under a fake clock, with blocks of a few bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from kvrelay.block_hash import layout_fingerprint
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.kv_transfer.transfer import Transfer
from kvrelay.kv_transfer.wire import FrameHeader, checksum
from kvrelay.v1 import cluster_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck

LAYERS, LAYER_BYTES, NUM_SLOTS = 2, 8, 6
SLOT_BYTES = LAYERS * LAYER_BYTES
HOLD_S = 60.0
STORED, CORRUPT = FrameAck.STATUS_STORED, FrameAck.STATUS_CORRUPT
STALE, REFUSED = FrameAck.STATUS_STALE, FrameAck.STATUS_REFUSED


def make_layout(**changes: int) -> cluster_pb2.KvLayout:
    values = {"num_layers": LAYERS, "num_kv_heads": 1, "head_elements": 1, "block_size_tokens": 4, **changes}
    layout = cluster_pb2.KvLayout(model="m", dtype="bfloat16")
    for name, value in values.items():
        setattr(layout, name, value)
    layout.fingerprint = layout_fingerprint(layout)
    return layout


LAYOUT = make_layout()


def name(i: int) -> bytes:
    return bytes([i]) * 16


def content(i: int, layer: int | None = None) -> bytes:
    whole = bytes([i, 0]) * (LAYER_BYTES // 2) + bytes([i, 1]) * (LAYER_BYTES // 2)
    return whole if layer is None else whole[layer * LAYER_BYTES : (layer + 1) * LAYER_BYTES]


class Rig:
    """A receiver under a fake clock, whose blocks are the numbers 0, 1, 2, ..."""

    def __init__(self, segment: Segment) -> None:
        self.now = 0.0
        self.segment = segment
        self.store = BlockStore(segment.num_slots)
        self.receiver = Receiver(self.store, segment, FrameDecoder(LAYOUT, ()), hold_s=HOLD_S, clock=lambda: self.now)

    def offer(self, request_id: str, blocks: list[int], owner: str = "") -> tuple[int, list[int]]:
        return self.receiver.offer(request_id, LAYOUT, b"".join(map(name, blocks)), owner=owner)[:2]

    def place(
        self, transfer_id: int, first_block: int, payload: bytes, *, layers: tuple[int, int] = (0, LAYERS)
    ) -> int:
        num_blocks = len(payload) // (layers[1] * LAYER_BYTES)
        return self.place_frame(FrameHeader(transfer_id, first_block, num_blocks, *layers), payload)

    def place_frame(self, header: FrameHeader, payload: bytes, *, flip: int = 0) -> int:
        """`flip`: bits of the checksum that are wrong."""
        checked = replace(header, checksum=checksum(header, [payload]) ^ flip)
        status = self.receiver.place(checked, memoryview(payload))
        self.receiver.announce()
        return status

    def assert_stored(self, *blocks: int) -> None:
        """Exactly these blocks are found under their hashes, with their content."""
        for block in range(20):
            slot = self.store.find(name(block))
            assert (slot is not None) == (block in blocks), f"block {block} in slot {slot}"
            if slot is not None:
                assert bytes(self.segment.slot_view(slot)) == content(block)

    def assert_idle(self) -> None:
        usage = self.store.usage()
        assert (usage.num_reserved, usage.num_pinned, self.receiver.num_transfers) == (0, 0, 0)


@contextmanager
def open_rig() -> Iterator[Rig]:
    """Nothing is held at its end, once the hold time has passed."""
    segment = Segment.create(size_for(NUM_SLOTS, SLOT_BYTES))
    segment.configure(SLOT_BYTES)
    rig = Rig(segment)
    yield rig
    rig.now += 10 * HOLD_S
    rig.receiver.expire()
    rig.assert_idle()
    segment.close()


async def waiting(rig: Rig, request_id: str, timeout_s: float = 30.0) -> asyncio.Task[Transfer | None]:
    """A task that has begun to wait."""
    task = asyncio.create_task(rig.receiver.wait_settled(request_id, timeout_s))
    await asyncio.sleep(0)
    return task

"""Parts of blocks become frames: neighbours are joined, large parts divided, and what was dropped is not read."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.frame_order import FrameOrder, cut
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.kv_transfer.wire import FRAME_BYTES, MAX_PAYLOAD_BYTES, checksum, decode_frame

LAYERS = 8
KIB = 1 << 10


def whole(*blocks: int) -> list[BlockPart]:
    return [BlockPart(block, 100 + block, 0, LAYERS) for block in blocks]


def test_neighbours_share_a_frame_up_to_its_size() -> None:
    parts = whole(0, 1, 2, 3, 4)
    assert list(cut(parts, FRAME_BYTES // 4 // LAYERS)) == [parts[:4], parts[4:]]


def test_a_gap_or_other_layers_begin_a_frame() -> None:
    parts = [*whole(0, 2), BlockPart(3, 103, 0, 4), BlockPart(4, 104, 4, 4), BlockPart(5, 105, 4, 4)]
    assert list(cut(parts, KIB)) == [parts[:1], parts[1:2], parts[2:3], parts[3:]]


def test_a_large_block_is_divided_by_layers() -> None:
    runs = list(cut(whole(7), MAX_PAYLOAD_BYTES // 3))
    assert runs == [[BlockPart(7, 107, 0, 3)], [BlockPart(7, 107, 3, 3)], [BlockPart(7, 107, 6, 2)]]


def test_one_layer_is_never_divided() -> None:
    assert len(list(cut(whole(7), 2 * MAX_PAYLOAD_BYTES))) == LAYERS


@given(
    blocks=st.sets(st.integers(0, 40)).map(sorted),
    first=st.integers(0, LAYERS - 1),
    layer_bytes=st.integers(1, MAX_PAYLOAD_BYTES * 2),
)
def test_nothing_is_lost_or_doubled(blocks: list[int], first: int, layer_bytes: int) -> None:
    parts = [BlockPart(block, block, first, LAYERS - first) for block in blocks]
    runs = list(cut(parts, layer_bytes))
    layers = [
        (part.block, layer)
        for run in runs
        for part in run
        for layer in range(part.first_layer, part.first_layer + part.num_layers)
    ]
    assert layers == [(block, layer) for block in blocks for layer in range(first, LAYERS)]
    for run in runs:
        size = sum(part.num_layers for part in run) * layer_bytes
        assert len(run) == 1 or size <= FRAME_BYTES
        assert size <= max(MAX_PAYLOAD_BYTES, layer_bytes)


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(size_for(4, LAYERS * 16))
    segment.configure(LAYERS * 16)
    for slot in range(4):
        segment.slot_view(slot)[:] = bytes(range(slot, slot + LAYERS * 16))
    yield segment
    segment.close()


def test_the_frame_holds_the_layers_of_its_slots(segment: Segment) -> None:
    order = FrameOrder(segment, 16, 9, [BlockPart(5, 2, 1, 2), BlockPart(6, 0, 1, 2)])
    frame = order.encode(ack_now=True)
    assert frame is not None
    header, payload = decode_frame(frame)
    assert bytes(payload) == bytes(range(18, 50)) + bytes(range(16, 48))
    assert (header.transfer_id, header.first_block, header.num_blocks) == (9, 5, 2)
    assert (header.first_layer, header.num_layers) == (1, 2)
    assert header.checksum == checksum(header, [payload])
    assert (order.key, order.num_bytes) == ((5, 1), 64)


def test_what_is_gathered_is_what_a_frame_holds(segment: Segment) -> None:
    order = FrameOrder(segment, 16, 9, [BlockPart(5, 2, 1, 2), BlockPart(6, 0, 1, 2), BlockPart(7, 3, 1, 2)])
    memory = np.zeros(order.num_bytes + 5, np.uint8)
    gathered = order.gather(memory)
    frame = order.encode(ack_now=False)
    assert frame is not None
    header, payload = decode_frame(frame)
    assert (gathered, memory[: order.num_bytes].tobytes()) == (header, bytes(payload))
    assert not memory[order.num_bytes :].any()
    assert order.was_sent


def test_what_was_dropped_is_not_read(segment: Segment) -> None:
    order = FrameOrder(segment, 16, 9, [BlockPart(5, 2, 0, LAYERS)])
    order.drop()
    order.drop()
    assert order.encode(ack_now=True) is None
    assert order.gather(np.zeros(order.num_bytes, np.uint8)) is None
    assert not order.was_sent

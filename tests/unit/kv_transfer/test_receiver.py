"""The receiver places what it asked for, refuses the rest, tells who waits, and at the end holds nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.encoding import Encoding, encode
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.offers import LayoutMismatchError, OfferError
from kvrelay.kv_transfer.part_shape import PartShape
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.kv_transfer.wire import MAX_PAYLOAD_BYTES, FrameHeader, checksum, encode_frame
from kvrelay.v1.kv_transfer_pb2 import FrameAck
from tests.support.receiver_rig import (
    CORRUPT,
    HOLD_S,
    LAYER_BYTES,
    LAYERS,
    LAYOUT,
    NUM_SLOTS,
    REFUSED,
    SLOT_BYTES,
    STALE,
    STORED,
    Rig,
    content,
    make_layout,
    name,
    open_rig,
    waiting,
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with open_rig() as rig:
        yield rig


def test_runs_of_blocks_are_placed_and_kept_until_let_go(rig: Rig) -> None:
    transfer_id, wanted = rig.offer("r", [0, 1, 2])
    assert wanted == [0, 1, 2]
    assert rig.place(transfer_id, 1, content(1) + content(2)) == STORED
    rig.assert_stored(1, 2)
    assert rig.place(transfer_id, 0, content(0)) == STORED
    rig.assert_stored(0, 1, 2)
    assert rig.store.usage().num_pinned == 3
    assert rig.receiver.commit(transfer_id) == 0
    rig.receiver.let_go("r")
    rig.assert_idle()
    rig.assert_stored(0, 1, 2)


def test_only_what_is_missing_is_wanted(rig: Rig) -> None:
    transfer_id, _ = rig.offer("a", [0, 1])
    rig.place(transfer_id, 0, content(0) + content(1))
    rig.receiver.let_go("a")
    transfer_id, wanted = rig.offer("b", [0, 5, 1, 6])
    assert wanted == [1, 3]
    assert rig.store.usage().num_pinned == 2, "what is here must not leave before the rest comes"
    assert rig.place(transfer_id, 3, content(6)) == STORED
    assert rig.place(transfer_id, 1, content(5)) == STORED
    rig.assert_stored(0, 1, 5, 6)


async def test_an_offer_of_known_blocks_is_settled_at_once(rig: Rig) -> None:
    for request_id in ("a", "b"):
        transfer_id, wanted = rig.offer(request_id, [0])
        if wanted:
            rig.place(transfer_id, 0, content(0))
    transfer = await rig.receiver.wait_settled("b", 0)
    assert transfer is not None
    assert transfer.settled


def test_layers_may_come_one_by_one(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0, 1])
    assert rig.place(transfer_id, 0, content(0, 1) + content(1, 1), layers=(1, 1)) == STORED
    rig.assert_stored()
    assert rig.place(transfer_id, 1, content(1, 0), layers=(0, 1)) == STORED
    rig.assert_stored(1)
    assert rig.receiver.commit(transfer_id) == 1
    rig.assert_stored(1)


def test_a_repeated_frame_changes_nothing(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0, 1])
    for _ in range(2):
        assert rig.place(transfer_id, 0, content(0)) == STORED
    assert rig.store.usage().num_reserved == 1
    # Written by somebody else meanwhile: the slot of a complete block belongs to the store.
    assert rig.place(transfer_id, 0, content(9)) == STORED
    rig.assert_stored(0)


def test_a_block_offered_twice_is_kept_once(rig: Rig) -> None:
    first, _ = rig.offer("a", [0])
    second, _ = rig.offer("b", [0])
    assert rig.place(first, 0, content(0)) == STORED
    assert rig.place(second, 0, content(0)) == STORED
    rig.receiver.let_go("a")
    assert rig.store.usage().num_pinned == 1
    rig.receiver.let_go("b")
    rig.assert_idle()


def test_the_same_hash_twice_in_one_offer(rig: Rig) -> None:
    transfer_id, wanted = rig.offer("r", [3, 3])
    assert rig.place(transfer_id, 0, content(3) * len(wanted)) == STORED
    rig.assert_stored(3)
    rig.receiver.let_go("r")
    rig.assert_idle()


def test_a_frame_for_an_ended_transfer_is_stale(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0])
    rig.receiver.let_go("r")
    [slot] = rig.store.reserve(1)
    assert rig.place(transfer_id, 0, content(0)) == STALE
    assert rig.place(1, 0, content(0)) == STALE
    assert not any(bytes(rig.segment.slot_view(slot)))
    rig.store.release([slot])


def test_a_new_offer_of_a_request_ends_its_old_one(rig: Rig) -> None:
    old, _ = rig.offer("r", [0, 1])
    rig.place(old, 0, content(0))
    new, wanted = rig.offer("r", [0, 1])
    assert new != old
    assert wanted == [1]
    assert rig.place(old, 1, content(1)) == STALE
    assert rig.place(new, 1, content(1)) == STORED
    assert rig.receiver.commit(old) == 0


def test_a_frame_after_the_commit_is_dropped(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0, 1])
    rig.place(transfer_id, 0, content(0))
    assert rig.receiver.commit(transfer_id) == 1
    [*slots] = rig.store.reserve(NUM_SLOTS)
    rig.place(transfer_id, 1, content(1))
    rig.assert_stored(0)
    assert not any(any(bytes(rig.segment.slot_view(slot))) for slot in slots)
    rig.store.release(slots)


def test_a_corrupt_frame_is_not_placed(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0])
    assert rig.place_frame(FrameHeader(transfer_id, 0, 1, 0, LAYERS), content(0), flip=1) == CORRUPT
    rig.assert_stored()
    assert rig.place(transfer_id, 0, content(0)) == STORED
    rig.assert_stored(0)


@pytest.mark.parametrize("changed", [{"num_blocks": 3}, {"first_block": 9}, {"first_layer": 1}, {"num_layers": 0}])
def test_a_header_that_was_changed_on_its_way_is_corrupt_and_not_refused(rig: Rig, changed: dict[str, int]) -> None:
    """A push goes on after the first and ends after the second."""
    transfer_id, _ = rig.offer("r", [0])
    header = FrameHeader(transfer_id, 0, 1, 0, LAYERS)
    header = replace(header, checksum=checksum(header, [content(0)]))
    assert rig.receiver.place(replace(header, **changed), memoryview(content(0))) == CORRUPT
    assert rig.receiver.place(header, memoryview(content(0))) == STORED


@pytest.mark.parametrize(
    ("first_block", "num_blocks", "first_layer", "num_layers", "num_bytes"),
    [
        (0, 0, 0, LAYERS, 0),
        (0, 1, 0, 0, 0),
        (0, 3, 0, LAYERS, 3 * SLOT_BYTES),
        (2, 1, 0, LAYERS, SLOT_BYTES),
        (2**32 - 1, 1, 0, LAYERS, SLOT_BYTES),
        (0, 2**32 - 1, 0, LAYERS, SLOT_BYTES),
        (0, 1, 1, LAYERS, SLOT_BYTES),
        (0, 1, LAYERS, 1, LAYER_BYTES),
        (0, 1, 0, 2**32 - 1, SLOT_BYTES),
        (0, 1, 0, LAYERS, SLOT_BYTES - 1),
        (0, 1, 0, LAYERS, SLOT_BYTES + 1),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(
    rig: Rig, first_block: int, num_blocks: int, first_layer: int, num_layers: int, num_bytes: int
) -> None:
    transfer_id, _ = rig.offer("r", [0, 1])
    payload = bytes(num_bytes)
    header = FrameHeader(transfer_id, first_block, num_blocks, first_layer, num_layers)
    assert rig.place_frame(header, payload) == REFUSED
    assert rig.store.usage().num_reserved == 2


def test_a_frame_may_not_bring_blocks_under_another_transfers_id(rig: Rig) -> None:
    """A block that was not wanted has no slot: nothing is written for it."""
    first, _ = rig.offer("a", [0])
    rig.place(first, 0, content(0))
    second, wanted = rig.offer("b", [0, 1])
    assert wanted == [1]
    assert rig.place(second, 0, content(7) + content(1)) == STORED
    rig.assert_stored(0, 1)


def test_a_full_store_wants_what_fits_first_blocks_first(rig: Rig) -> None:
    in_use = rig.store.reserve(NUM_SLOTS - 2)
    transfer_id, wanted = rig.offer("r", [0, 1, 2, 3])
    assert wanted == [0, 1]
    assert rig.place(transfer_id, 0, content(0) + content(1)) == STORED
    assert rig.receiver.commit(transfer_id) == 0
    rig.receiver.let_go("r")
    rig.store.release(in_use)


def test_the_sender_is_told_why_less_is_wanted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = rig.store.reserve(NUM_SLOTS - 2)
    hashes = b"".join(map(name, range(3)))
    assert rig.receiver.offer("a", LAYOUT, hashes).reason == "the store has room for 2 of 3 blocks"
    assert rig.receiver.offer("a", LAYOUT, hashes[:32]).reason == ""
    monkeypatch.setattr("kvrelay.kv_transfer.receiver._MAX_TRANSFERS", 1)
    assert rig.receiver.offer("b", LAYOUT, hashes)[1:] == ([], "1 transfers are open")
    rig.receiver.let_go("a")
    assert rig.receiver.offer("a", LAYOUT, hashes)[1:] == ([], "the request is over, or has begun without them")
    rig.store.release(in_use)
    rig.assert_idle()


async def test_a_store_without_any_room_settles_at_once(rig: Rig) -> None:
    in_use = rig.store.reserve(NUM_SLOTS)
    _, wanted = rig.offer("r", [0])
    assert wanted == []
    assert await rig.receiver.wait_settled("r", 0) is not None
    rig.store.release(in_use)


@pytest.mark.parametrize(("num_blocks", "status"), [(2, STORED), (3, REFUSED)])
def test_a_short_payload_cannot_claim_more_memory_than_a_frame_has(
    num_blocks: int, status: FrameAck.Status.ValueType
) -> None:
    layout = make_layout(head_elements=MAX_PAYLOAD_BYTES // (2 * LAYERS * 4 * 2))
    segment = Segment.create(size_for(4, MAX_PAYLOAD_BYTES // 2))
    segment.configure(MAX_PAYLOAD_BYTES // 2)
    receiver = Receiver(BlockStore(4), segment, FrameDecoder(layout, [Encoding.LOSSLESS]))
    transfer_id, *_ = receiver.offer("r", layout, b"".join(map(name, range(3))))
    zeros = memoryview(bytes(MAX_PAYLOAD_BYTES // 2))
    payload = b"".join(encode(Encoding.LOSSLESS, PartShape.of(layout, LAYERS), [zeros] * num_blocks))
    assert len(payload) < MAX_PAYLOAD_BYTES // 100
    header = FrameHeader(transfer_id, 0, num_blocks, 0, LAYERS, encoding=Encoding.LOSSLESS.value)
    assert receiver.place(replace(header, checksum=checksum(header, [payload])), memoryview(payload)) == status
    receiver.cancel("r")
    segment.close()


def test_another_layout_is_refused_and_both_are_shown(rig: Rig) -> None:
    with pytest.raises(LayoutMismatchError, match=r"sender \[.*3 layers.*\], receiver \[.*2 layers.*\]"):
        rig.receiver.offer("r", make_layout(num_layers=3), name(0))
    rig.assert_idle()


@pytest.mark.parametrize("hashes", [b"", b"x" * 15, b"x" * 17])
def test_malformed_hashes_are_refused(rig: Rig, hashes: bytes) -> None:
    with pytest.raises(OfferError, match=f"{len(hashes)} bytes"):
        rig.receiver.offer("r", LAYOUT, hashes)


async def test_who_waits_is_told_when_the_last_block_is_there(rig: Rig) -> None:
    before_the_offer = await waiting(rig, "r")
    transfer_id, _ = rig.offer("r", [0, 1])
    after_the_offer = await waiting(rig, "r")
    rig.place(transfer_id, 0, content(0))
    await asyncio.sleep(0)
    assert not before_the_offer.done()
    assert not after_the_offer.done()
    rig.place(transfer_id, 1, content(1))
    transfers = await asyncio.gather(before_the_offer, after_the_offer)
    assert all(t is not None and t.settled and t.received_blocks == 2 for t in transfers)
    assert transfers[0] is not None
    assert transfers[0].received_bytes == 2 * SLOT_BYTES


async def test_who_waits_is_told_when_no_more_is_coming(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0, 1])
    task = await waiting(rig, "r")
    rig.place(transfer_id, 0, content(0))
    rig.receiver.commit(transfer_id)
    transfer = await task
    assert transfer is not None
    assert transfer.received_blocks == 1


async def test_waiting_ends_with_its_deadline(rig: Rig) -> None:
    assert await rig.receiver.wait_settled("r", 0.001) is None
    transfer_id, _ = rig.offer("r", [0, 1])
    rig.place(transfer_id, 0, content(0))
    transfer = await rig.receiver.wait_settled("r", 0.001)
    assert transfer is not None
    assert not transfer.settled


async def test_one_of_several_that_wait_does_not_end_it_for_the_others(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0])
    one, other = await waiting(rig, "r"), await waiting(rig, "r")
    one.cancel()
    await asyncio.wait([one])
    rig.receiver.let_go("r")
    assert rig.place(transfer_id, 0, content(0)) == STORED
    assert await other is not None
    rig.receiver.let_go("r")
    rig.assert_idle()


async def test_the_last_that_waits_ends_it(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0])
    tasks = [await waiting(rig, "r") for _ in range(3)]
    for task in tasks:
        task.cancel()
        await asyncio.wait([task])
        rig.receiver.let_go("r")
    rig.assert_idle()
    assert rig.place(transfer_id, 0, content(0)) == STALE


async def test_who_comes_after_the_transfer_was_used_does_not_wait(rig: Rig) -> None:
    """The n completions of a prompt share one transfer, and the first lets go of it."""
    transfer_id, _ = rig.offer("r", [0])
    rig.place(transfer_id, 0, content(0))
    rig.receiver.let_go("r")
    async with asyncio.timeout(10):
        assert await rig.receiver.wait_settled("r", 1000) is None


def test_an_offer_that_comes_after_the_cancel_reserves_nothing(rig: Rig) -> None:
    rig.receiver.let_go("r")
    transfer_id, wanted = rig.offer("r", [0, 1])
    assert wanted == []
    rig.assert_idle()
    assert rig.receiver.commit(transfer_id) == 0
    assert rig.place(transfer_id, 0, content(0)) == STALE


def test_what_nobody_asks_for_expires(rig: Rig) -> None:
    rig.offer("lost", [0, 1])
    rig.now = HOLD_S / 2
    fed, _ = rig.offer("fed", [2, 3])
    rig.now = HOLD_S + 1
    rig.place(fed, 0, content(2))
    assert rig.receiver.expire() == 1
    rig.now = 1.75 * HOLD_S
    assert rig.receiver.expire() == 0, "a frame came within the hold time"
    rig.now = 2 * HOLD_S + 2
    assert rig.receiver.expire() == 1
    rig.assert_idle()
    rig.assert_stored(2)


async def test_what_somebody_waits_for_does_not_expire(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0])
    task = await waiting(rig, "r")
    rig.now = 2 * HOLD_S
    assert rig.receiver.expire() == 0
    rig.place(transfer_id, 0, content(0))
    assert await task is not None


async def test_a_stream_that_breaks_ends_its_unfinished_transfers(rig: Rig) -> None:
    done, _ = rig.offer("done", [1])
    cut, _ = rig.offer("cut", [2, 3])

    def frames() -> Iterator[bytes]:
        for transfer_id, block in ((done, 1), (cut, 2)):
            payload = content(block)
            yield encode_frame(FrameHeader(transfer_id, 0, 1, 0, LAYERS), [payload])
        raise grpc.RpcError

    with pytest.raises(grpc.RpcError):
        list(PushServer(rig.receiver).push(frames(), cast("Any", None)))

    transfer = await rig.receiver.wait_settled("cut", timeout_s=5)
    assert transfer is not None
    assert transfer.received_blocks == 1
    rig.assert_stored(1, 2)
    assert rig.store.usage().num_reserved == 0
    for request_id in ("done", "cut"):
        rig.receiver.let_go(request_id)
